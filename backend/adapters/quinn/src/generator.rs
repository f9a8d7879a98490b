//! Connection IDs whose nonces never repeat, and what to issue when there are none left.

use std::collections::HashMap;

use num_bigint::BigUint;
use ring::digest::{SHA256, digest};
use ring::hmac;
use ring::rand::{SecureRandom, SystemRandom};

use crate::cid::{CidConfig, Codec, KEY_LENGTH, UNROUTABLE, hide_counter};
use crate::config::ServerConfig;
use crate::hex;
use crate::marks::{Mark, MarksFile};

const BLOCK: u32 = 1 << 16; // nonces per reservation: one durable write, and at most as many lost in a crash
const RETRY_EVERY: u64 = 64; // CIDs between two attempts to write a mark after one failed
const UNROUTABLE_LENGTH: usize = 8; // octets, without a configuration

/// Issues connection IDs under one configuration at a time, all of one length, because quinn reads them by one length.
/// Without a configuration, and when its nonces are used up, it issues 0b111 ones, which balancers route by address.
pub struct Generator {
    length: usize,
    marks: Option<MarksFile>,
    counters: HashMap<String, Counter>,
    current: Option<u8>,
    /// By config ID: what connection IDs of this server may be made of.
    known: [Option<Source>; UNROUTABLE as usize],
}

/// A configuration to issue under. Those that share key and server ID share a counter.
struct Source {
    codec: Codec,
    server_id: Vec<u8>,
    reset_key: Option<hmac::Key>,
    identity: String,
}

impl Generator {
    /// Fails if the nonce file cannot be used.
    pub fn new(config: &ServerConfig) -> Result<Self, String> {
        let mut generator = Self {
            length: config.cid.as_ref().map_or(UNROUTABLE_LENGTH, CidConfig::cid_length),
            marks: config.nonce_file.as_deref().map(MarksFile::open).transpose()?,
            counters: HashMap::new(),
            current: None,
            known: [const { None }; UNROUTABLE as usize],
        };
        generator.switch(config)?;
        Ok(generator)
    }

    /// Issue under another configuration from the next connection ID on. If it fails nothing has changed.
    pub fn switch(&mut self, config: &ServerConfig) -> Result<(), String> {
        if config.nonce_file.as_ref() != self.marks.as_ref().map(|marks| &marks.path) {
            return Err("nonce-file: another one than before: that takes a restart".into());
        }
        let Some(cid) = &config.cid else {
            self.current = None;
            return Ok(());
        };
        if cid.cid_length() != self.length {
            return Err(format!(
                "cid-config: CIDs of {} octets instead of {}: that takes a restart, quinn reads them by one length",
                cid.cid_length(),
                self.length
            ));
        }
        let identity = identity(cid, &config.server_id);
        if !self.counters.contains_key(&identity) {
            let mark = self.marks.as_ref().and_then(|marks| marks.marks.get(&identity).cloned());
            let counter = Counter::new(cid, mark, self.marks.is_some()).map_err(|why| format!("nonce mark: {why}"))?;
            self.counters.insert(identity.clone(), counter);
        }
        let reset_key = config.reset_key.map(|key| hmac::Key::new(hmac::HMAC_SHA256, &key));
        let codec = Codec::new(cid.clone())?;
        self.current = Some(cid.config_id);
        self.known[usize::from(cid.config_id)] =
            Some(Source { codec, server_id: config.server_id.clone(), reset_key, identity });
        Ok(())
    }

    /// A connection ID that was never issued before.
    pub fn issue(&mut self) -> Vec<u8> {
        let source = self.current.and_then(|id| self.known[usize::from(id)].as_ref());
        let nonce = source.and_then(|source| {
            let counter = self.counters.get_mut(&source.identity)?;
            counter.next(&source.identity, self.marks.as_mut())
        });
        match (source, nonce) {
            (Some(Source { codec, server_id, .. }), Some(nonce)) => {
                let spare = random(1 + codec.config.appended_length);
                codec.encode(server_id, &nonce, spare[0], &spare[1..])
            }
            _ => {
                let mut cid = random(self.length);
                cid[0] = UNROUTABLE << 5 | (self.length - 1) as u8;
                cid
            }
        }
    }

    /// The length of every connection ID.
    pub fn length(&self) -> usize {
        self.length
    }

    /// Whether a connection ID has this server's ID, and there is a key to reset it with.
    pub fn may_reset(&self, cid: &[u8]) -> bool {
        self.source(cid).is_some_and(|source| {
            source.reset_key.is_some()
                && source.codec.decode(cid).is_some_and(|(server_id, _)| server_id == source.server_id)
        })
    }

    /// The key that the stateless reset token of a connection ID is made with.
    pub fn reset_key(&self, cid: &[u8]) -> Option<&hmac::Key> {
        self.source(cid)?.reset_key.as_ref()
    }

    fn source(&self, cid: &[u8]) -> Option<&Source> {
        self.known.get(usize::from(cid.first()? >> 5))?.as_ref()
    }
}

/// The nonces of one key and server ID: where they begin, how many were used, how many may be.
struct Counter {
    length: usize,
    space: BigUint,
    mark: Mark,
    used: BigUint,
    failed: u64, // CIDs since a mark could not be written
}

impl Counter {
    fn new(config: &CidConfig, mark: Option<Mark>, is_durable: bool) -> Result<Self, String> {
        let length = config.nonce_length;
        let space = BigUint::from(1u8) << (8 * length);
        let mut mark = mark.unwrap_or_else(|| Mark {
            start: BigUint::from_bytes_be(&random(length)),
            reserved: BigUint::ZERO,
            permutation_key: config.key.is_none().then(|| {
                let mut key = [0; KEY_LENGTH];
                fill(&mut key);
                key
            }),
        });
        if mark.start >= space || mark.reserved > space {
            return Err(format!("not one for nonces of {length} octets"));
        }
        // What was reserved and not used by the process before us is skipped: nobody knows how much was.
        let used = mark.reserved.clone();
        if !is_durable {
            mark.reserved = space.clone();
        }
        Ok(Self { length, space, mark, used, failed: 0 })
    }

    /// A nonce that is certainly fresh; None if there is none.
    fn next(&mut self, identity: &str, marks: Option<&mut MarksFile>) -> Option<Vec<u8>> {
        if self.used >= self.mark.reserved {
            if self.used >= self.space {
                return None;
            }
            if self.failed > 0 {
                self.failed += 1;
                if !self.failed.is_multiple_of(RETRY_EVERY) {
                    return None; // a full disk must not cost a write per packet
                }
            }
            let reserved = (&self.used + BLOCK).min(self.space.clone());
            let wanted = Mark { reserved, ..self.mark.clone() };
            if marks?.save(identity, &wanted).is_err() {
                self.failed = self.failed.max(1);
                return None;
            }
            self.failed = 0;
            self.mark = wanted;
        }
        let counter = (&self.mark.start + &self.used) % &self.space;
        self.used += 1u8;
        let octets = counter.to_bytes_be();
        let mut nonce = vec![0; self.length - octets.len().min(self.length)];
        nonce.extend_from_slice(&octets);
        Some(self.mark.permutation_key.as_ref().map_or(nonce.clone(), |key| hide_counter(key, &nonce)))
    }
}

/// The name of a nonce space in a nonce file. It does not tell the key.
pub fn identity(config: &CidConfig, server_id: &[u8]) -> String {
    let mut space = vec![config.server_id_length as u8, config.nonce_length as u8];
    space.extend_from_slice(server_id);
    let octets = match &config.key {
        Some(key) => {
            let key = hmac::Key::new(hmac::HMAC_SHA256, key);
            hmac::sign(&key, &[b"quiclb nonces", &space[..]].concat()).as_ref()[..16].to_vec()
        }
        None => {
            let name = [b"quiclb plaintext nonces", &[config.config_id][..], &space].concat();
            digest(&SHA256, &name).as_ref()[..16].to_vec()
        }
    };
    hex::encode(&octets)
}

/// The stateless reset token of a connection ID: the first 16 octets of HMAC-SHA256(key, CID).
pub fn reset_token(key: &hmac::Key, cid: &[u8]) -> [u8; 16] {
    let mut token = [0; 16];
    token.copy_from_slice(&hmac::sign(key, cid).as_ref()[..16]);
    token
}

pub fn random(length: usize) -> Vec<u8> {
    let mut octets = vec![0; length];
    fill(&mut octets);
    octets
}

fn fill(octets: &mut [u8]) {
    SystemRandom::new().fill(octets).expect("the kernel has randomness");
}
