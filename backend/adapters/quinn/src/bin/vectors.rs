//! Computes what tests/data/adapter-vectors.json asks for, so that a test can compare. JSON in, JSON out.

use std::io::{self, Read};

use quiclb::cid::{CidConfig, Codec, hide_counter};
use quiclb::generator::{identity, reset_token};
use quiclb::hex;
use ring::hmac;
use serde_json::Value;

fn main() {
    let mut text = String::new();
    io::stdin().read_to_string(&mut text).expect("vectors on stdin");
    let mut vectors: Value = serde_json::from_str(&text).expect("JSON");
    each(&mut vectors, "cids", |vector| {
        let (server_id, nonce, appended) =
            (octets(vector, "server_id"), octets(vector, "nonce"), octets(vector, "appended"));
        let codec = Codec::new(CidConfig {
            config_id: number(vector, "config_id") as u8,
            server_id_length: server_id.len(),
            nonce_length: nonce.len(),
            key: key(vector),
            encodes_length: vector["encodes_length"] == true,
            appended_length: appended.len(),
        });
        let codec = codec.expect("a valid configuration");
        let (decoded_id, decoded_nonce) = codec.decode(&octets(vector, "cid")).expect("a connection ID of its own");
        let cid = codec.encode(&server_id, &nonce, number(vector, "low_bits") as u8, &appended);
        vector["cid"] = hex::encode(&cid).into();
        vector["server_id"] = hex::encode(&decoded_id).into();
        vector["nonce"] = hex::encode(&decoded_nonce).into();
    });
    each(&mut vectors, "tokens", |vector| {
        let key = hmac::Key::new(hmac::HMAC_SHA256, &octets(vector, "key"));
        vector["token"] = hex::encode(&reset_token(&key, &octets(vector, "cid"))).into();
    });
    each(&mut vectors, "identities", |vector| {
        let server_id = octets(vector, "server_id");
        let config = CidConfig {
            config_id: number(vector, "config_id") as u8,
            server_id_length: server_id.len(),
            nonce_length: number(vector, "nonce_length"),
            key: key(vector),
            encodes_length: true,
            appended_length: 0,
        };
        vector["identity"] = identity(&config, &server_id).into();
    });
    each(&mut vectors, "permutations", |vector| {
        let key = key(vector).expect("a key of 16 octets");
        vector["nonce"] = hex::encode(&hide_counter(&key, &octets(vector, "counter"))).into();
    });
    println!("{vectors}");
}

fn each(vectors: &mut Value, section: &str, compute: impl Fn(&mut Value)) {
    vectors[section].as_array_mut().expect("a list").iter_mut().for_each(compute);
}

fn octets(vector: &Value, name: &str) -> Vec<u8> {
    vector[name].as_str().and_then(hex::decode).expect("hex digits")
}

fn number(vector: &Value, name: &str) -> usize {
    vector[name].as_u64().expect("a number") as usize
}

fn key(vector: &Value) -> Option<[u8; 16]> {
    vector["key"].as_str().map(|_| octets(vector, "key").try_into().expect("16 octets"))
}
