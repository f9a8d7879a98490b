//! A quinn endpoint that knows no connection: it answers short headers with the stateless resets of its key.
//!
//! Reads lines "KEY CID" in hex, writes the last 16 octets of each answer in hex.
use std::{io::BufRead, sync::Arc, time::Instant};

use quinn_proto::{ConnectionId, ConnectionIdGenerator, DatagramEvent, Endpoint, EndpointConfig};

struct Length(usize);

impl ConnectionIdGenerator for Length {
    fn generate_cid(&mut self) -> ConnectionId {
        ConnectionId::new(&vec![0; self.0])
    }
    fn cid_len(&self) -> usize {
        self.0
    }
    fn cid_lifetime(&self) -> Option<std::time::Duration> {
        None
    }
}

fn octets(hex: &str) -> Vec<u8> {
    (0..hex.len())
        .step_by(2)
        .map(|i| u8::from_str_radix(&hex[i..i + 2], 16).unwrap())
        .collect()
}

fn main() {
    for line in std::io::stdin().lock().lines() {
        let line = line.unwrap();
        let (key, cid) = line.split_once(' ').unwrap();
        let (key, cid) = (octets(key), octets(cid));
        let length = cid.len();
        let mut config = EndpointConfig::new(Arc::new(ring::hmac::Key::new(
            ring::hmac::HMAC_SHA256,
            &key,
        )));
        config.cid_generator(move || Box::new(Length(length)));
        let mut endpoint = Endpoint::new(Arc::new(config), None, true, None);
        let mut packet = vec![0x40u8];
        packet.extend_from_slice(&cid);
        packet.resize(100, 0x5a);
        let mut answer = Vec::new();
        let event = endpoint.handle(
            Instant::now(),
            "127.0.0.1:1".parse().unwrap(),
            None,
            None,
            packet.as_slice().into(),
            &mut answer,
        );
        assert!(matches!(event, Some(DatagramEvent::Response(_))));
        println!(
            "{}",
            answer[answer.len() - 16..]
                .iter()
                .map(|o| format!("{o:02x}"))
                .collect::<String>()
        );
    }
}
