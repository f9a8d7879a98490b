//! Retry tokens and session tickets that any server with the same keys accepts: the first key makes them, all open them.

use std::fmt;

use quinn::crypto::{AeadKey, CryptoError, HandshakeTokenKey};
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::hkdf::{HKDF_SHA256, Prk};
use rustls::server::ProducesTickets;

use crate::generator::random;

const TICKET_LIFETIME: u32 = 24 * 3600; // seconds

/// Makes the key of each Retry token, and opens those of any key.
pub struct TokenKeys(Vec<Prk>);

impl TokenKeys {
    pub fn new(keys: &[[u8; 32]]) -> Self {
        Self(keys.iter().map(|key| Prk::new_less_safe(HKDF_SHA256, &derive(key, b"quiclb quinn token"))).collect())
    }
}

impl HandshakeTokenKey for TokenKeys {
    fn aead_from_hkdf(&self, random_bytes: &[u8]) -> Box<dyn AeadKey> {
        let key = |prk: &Prk| {
            let info = [random_bytes];
            let okm = prk.expand(&info, &AES_256_GCM).expect("the length is AES's");
            LessSafeKey::new(UnboundKey::from(okm))
        };
        Box::new(OneTimeKeys(self.0.iter().map(key).collect()))
    }
}

struct OneTimeKeys(Vec<LessSafeKey>);

impl AeadKey for OneTimeKeys {
    fn seal(&self, data: &mut Vec<u8>, additional_data: &[u8]) -> Result<(), CryptoError> {
        let key = self.0.first().ok_or(CryptoError)?;
        let nonce = Nonce::assume_unique_for_key([0; NONCE_LEN]); // the key is of one token alone
        key.seal_in_place_append_tag(nonce, Aad::from(additional_data), data).map_err(|_| CryptoError)
    }

    fn open<'a>(&self, data: &'a mut [u8], additional_data: &[u8]) -> Result<&'a mut [u8], CryptoError> {
        for key in &self.0 {
            let mut attempt = data.to_vec();
            let nonce = Nonce::assume_unique_for_key([0; NONCE_LEN]);
            if let Ok(plain) = key.open_in_place(nonce, Aad::from(additional_data), &mut attempt) {
                let plain = &*plain;
                data[..plain.len()].copy_from_slice(plain);
                return Ok(&mut data[..plain.len()]);
            }
        }
        Err(CryptoError)
    }
}

/// Session tickets: a random nonce, and the session under AES-256-GCM.
pub struct Tickets(Vec<LessSafeKey>);

impl Tickets {
    pub fn new(keys: &[[u8; 32]]) -> Self {
        let key = |key: &[u8; 32]| {
            let unbound = UnboundKey::new(&AES_256_GCM, &derive(key, b"quiclb quinn ticket"));
            LessSafeKey::new(unbound.expect("the length is AES's"))
        };
        Self(keys.iter().map(key).collect())
    }
}

impl fmt::Debug for Tickets {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Tickets") // rustls asks for this; keys are nobody's business
    }
}

impl ProducesTickets for Tickets {
    fn enabled(&self) -> bool {
        true
    }

    fn lifetime(&self) -> u32 {
        TICKET_LIFETIME
    }

    fn encrypt(&self, plain: &[u8]) -> Option<Vec<u8>> {
        let mut ticket = random(NONCE_LEN);
        let nonce = Nonce::try_assume_unique_for_key(&ticket).ok()?;
        let mut sealed = plain.to_vec();
        self.0.first()?.seal_in_place_append_tag(nonce, Aad::empty(), &mut sealed).ok()?;
        ticket.append(&mut sealed);
        Some(ticket)
    }

    fn decrypt(&self, ticket: &[u8]) -> Option<Vec<u8>> {
        let (nonce, sealed) = ticket.split_at_checked(NONCE_LEN)?;
        self.0.iter().find_map(|key| {
            let nonce = Nonce::try_assume_unique_for_key(nonce).ok()?;
            let mut attempt = sealed.to_vec();
            let plain = key.open_in_place(nonce, Aad::empty(), &mut attempt).ok()?;
            Some(plain.to_vec())
        })
    }
}

/// A key for one purpose. The first key is uniformly random, so that HKDF's extract step has nothing to do.
fn derive(key: &[u8; 32], purpose: &[u8]) -> [u8; 32] {
    let mut derived = [0; 32];
    let info = [purpose];
    let key = Prk::new_less_safe(HKDF_SHA256, key);
    let okm = key.expand(&info, HKDF_SHA256).expect("the length is the hash's");
    okm.fill(&mut derived).expect("the length is the hash's");
    derived
}
