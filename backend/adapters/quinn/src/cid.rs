//! QUIC-LB connection IDs: how a server ID and a nonce sit in one, and how to get them out again.
//!
//! From draft-ietf-quic-load-balancers; section numbers are those of its editors' copy after -21.

use aes::Aes128;
use aes::cipher::{Block, BlockDecrypt, BlockEncrypt, KeyInit};

pub const KEY_LENGTH: usize = 16;
/// The config ID of connection IDs that carry no server ID (section 3.2).
pub const UNROUTABLE: u8 = 0b111;
const MIN_NONCE_LENGTH: usize = 4;
const MAX_ROUTING_BLOCK: usize = 19;
const MAX_CID_LENGTH: usize = 20;
const LENGTH_BITS: u8 = 0b0001_1111;
const AES_BLOCK: usize = 16;

/// How connection IDs carry a server ID (section 5.3). Without a key they are plaintext.
#[derive(Clone, PartialEq, Eq)]
pub struct CidConfig {
    pub config_id: u8,
    pub server_id_length: usize,
    pub nonce_length: usize,
    pub key: Option<[u8; KEY_LENGTH]>,
    pub encodes_length: bool,
    pub appended_length: usize,
}

impl CidConfig {
    /// The length of a whole connection ID.
    pub fn cid_length(&self) -> usize {
        1 + self.server_id_length + self.nonce_length + self.appended_length
    }

    /// What section 5.3 does not allow in it, if anything.
    pub fn check(&self) -> Result<(), String> {
        let block = self.server_id_length + self.nonce_length;
        if self.config_id >= UNROUTABLE {
            Err(format!("config ID {}: expected 0 to 6 (0b111 marks unroutable CIDs)", self.config_id))
        } else if self.server_id_length < 1 {
            Err(format!("server ID length {}: expected at least 1 octet", self.server_id_length))
        } else if self.nonce_length < MIN_NONCE_LENGTH {
            Err(format!("nonce length {}: expected at least 4 octets", self.nonce_length))
        } else if block > MAX_ROUTING_BLOCK {
            Err(format!("server ID and nonce take {block} octets together: expected at most 19"))
        } else if self.cid_length() > MAX_CID_LENGTH {
            Err(format!("{} appended octets: a CID holds at most 20 octets in all", self.appended_length))
        } else {
            Ok(())
        }
    }
}

/// Encodes and decodes the connection IDs of one configuration.
pub struct Codec {
    pub config: CidConfig,
    aes: Option<Aes128>,
}

impl Codec {
    pub fn new(config: CidConfig) -> Result<Self, String> {
        config.check()?;
        let aes = config.key.map(|key| Aes128::new(&key.into()));
        Ok(Self { config, aes })
    }

    /// The connection ID of a server ID and a nonce. `low_bits` fills the first octet of one that does not encode its
    /// length; `appended` is what the server adds for its own use. Panics unless all have the configured lengths.
    pub fn encode(&self, server_id: &[u8], nonce: &[u8], low_bits: u8, appended: &[u8]) -> Vec<u8> {
        let config = &self.config;
        assert_eq!(
            (server_id.len(), nonce.len(), appended.len()),
            (config.server_id_length, config.nonce_length, config.appended_length)
        );
        let low_bits = if config.encodes_length { (config.cid_length() - 1) as u8 } else { low_bits & LENGTH_BITS };
        let mut cid = Vec::with_capacity(config.cid_length());
        cid.push(config.config_id << 5 | low_bits);
        for part in [server_id, nonce, appended] {
            cid.extend_from_slice(part);
        }
        let block = &mut cid[1..1 + config.server_id_length + config.nonce_length];
        if let Some(aes) = &self.aes {
            if block.len() == AES_BLOCK {
                aes.encrypt_block(Block::<Aes128>::from_mut_slice(block));
            } else {
                four_pass_encrypt(aes, block);
            }
        }
        cid
    }

    /// Server ID and nonce of a connection ID; None if it is too short or has another config ID.
    pub fn decode(&self, cid: &[u8]) -> Option<(Vec<u8>, Vec<u8>)> {
        let config = &self.config;
        let mut block = cid.get(1..1 + config.server_id_length + config.nonce_length)?.to_vec();
        if cid[0] >> 5 != config.config_id {
            return None;
        }
        if let Some(aes) = &self.aes {
            if block.len() == AES_BLOCK {
                aes.decrypt_block(Block::<Aes128>::from_mut_slice(&mut block));
            } else {
                four_pass_decrypt(aes, &mut block);
            }
        }
        let nonce = block.split_off(config.server_id_length);
        Some((block, nonce))
    }
}

/// Makes the nonce of a plaintext configuration: nonces must not be related to each other (section 5.4), and a
/// permutation, the four passes under a key of the nonce file's, keeps them distinct.
pub fn hide_counter(key: &[u8; KEY_LENGTH], counter: &[u8]) -> Vec<u8> {
    let mut nonce = counter.to_vec();
    four_pass_encrypt(&Aes128::new(key.into()), &mut nonce);
    nonce
}

/// Section 5.4.2: a Feistel network of four passes over the two halves of `text`, in place.
fn four_pass_encrypt(aes: &Aes128, text: &mut [u8]) {
    (1..=4).for_each(|pass| four_pass(aes, text, pass));
}

fn four_pass_decrypt(aes: &Aes128, text: &mut [u8]) {
    (1..=4).rev().for_each(|pass| four_pass(aes, text, pass));
}

/// One pass changes the right half by the left one if its number is odd, else the left half by the right one.
/// Halves of an odd number of octets share the middle octet: its high bits belong to the left half.
fn four_pass(aes: &Aes128, text: &mut [u8], pass: u8) {
    let length = text.len();
    let half = length.div_ceil(2);
    let (left, right) = (0..half, length - half..length);
    let from_left = pass % 2 == 1;
    let (from, to) = if from_left { (left, right) } else { (right, left) };
    let is_shared = length % 2 == 1;

    let mut mask = Block::<Aes128>::default();
    mask[..half].copy_from_slice(&text[from]);
    if is_shared {
        if from_left { mask[half - 1] &= 0xf0 } else { mask[0] &= 0x0f }
    }
    mask[14..].copy_from_slice(&[length as u8, pass]);
    aes.encrypt_block(&mut mask);
    if is_shared {
        if from_left { mask[0] &= 0x0f } else { mask[half - 1] &= 0xf0 }
    }
    for (octet, mask) in text[to].iter_mut().zip(mask) {
        *octet ^= mask;
    }
}
