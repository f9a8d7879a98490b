//! One routable server: its configuration, and what quinn needs of it.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use quinn::crypto::{CryptoError, HandshakeTokenKey, HmacKey};
use quinn::{ConnectionId, ConnectionIdGenerator, EndpointConfig};
use quinn_proto::InvalidCid;
use ring::hmac;

use crate::config::{Mistakes, ServerConfig};
use crate::generator::{Generator, random};
use crate::keyfile::read_token_keys;
use crate::tokens::{Tickets, TokenKeys};

/// Between two stateless resets. It is a limit for all clients together, and only own connection IDs are answered.
const RESET_INTERVAL: Duration = Duration::from_micros(100);

/// A server that balancers can route to. One of it is for all endpoints of a process, and every process needs server
/// IDs of its own.
pub struct Routable {
    path: PathBuf,
    token_keys: Vec<[u8; 32]>,
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    /// For tokens of connection IDs that have no key: nobody else can make them.
    process_key: hmac::Key,
}

struct State {
    config: ServerConfig,
    /// By which connection IDs are made no more.
    left: Vec<ServerConfig>,
    generator: Generator,
}

impl Routable {
    /// Read a server's file and, if there is one, the file of keys that the fleet's Retry tokens and session tickets are
    /// made with.
    pub fn load(path: &Path, token_key_file: Option<&Path>) -> Result<Self, Mistakes> {
        let config = ServerConfig::load(path)?;
        let token_keys = match token_key_file {
            Some(file) => read_token_keys(file)?,
            None => vec![fresh_key()],
        };
        let generator = Generator::new(&config)?;
        let process_key = hmac::Key::new(hmac::HMAC_SHA256, &fresh_key());
        let shared = Arc::new(Shared { state: Mutex::new(State { config, left: Vec::new(), generator }), process_key });
        Ok(Self { path: path.to_owned(), token_keys, shared })
    }

    /// Read the file again; new connection IDs and tokens are by it from then on. If it fails nothing has changed.
    pub fn reload(&self) -> Result<(), Mistakes> {
        let config = ServerConfig::load(&self.path)?;
        let mut state = self.shared.state();
        if let Some(why) = state.obstacle(&config) {
            return Err(why.into());
        }
        state.generator.switch(&config)?;
        let before = std::mem::replace(&mut state.config, config);
        if before.cid.is_some() && !before.has_same_cids(&state.config) {
            state.left.push(before);
        }
        Ok(())
    }

    pub fn name(&self) -> String {
        self.shared.state().config.name.clone()
    }

    pub fn server_id(&self) -> Vec<u8> {
        self.shared.state().config.server_id.clone()
    }

    /// What an endpoint needs to issue connection IDs of this server, and to reset those that it forgot.
    ///
    /// A new configuration reaches live connections when their connection IDs end, `cid_lifetime` after they were issued.
    /// It should be longer than the idle timeout: replacing them keeps a connection alive that has nothing to say.
    pub fn endpoint_config(&self, cid_lifetime: Option<Duration>) -> EndpointConfig {
        let shared = self.shared.clone();
        let mut config = EndpointConfig::new(self.reset_keys());
        config
            .cid_generator(move || Box::new(Issuer { shared: shared.clone(), cid_lifetime }))
            .min_reset_interval(RESET_INTERVAL);
        config
    }

    /// What stateless reset tokens are made with. `endpoint_config` has it already.
    pub fn reset_keys(&self) -> Arc<dyn HmacKey> {
        self.shared.clone()
    }

    /// Issues connection IDs. `endpoint_config` has it already.
    pub fn issuer(&self, cid_lifetime: Option<Duration>) -> Box<dyn ConnectionIdGenerator> {
        Box::new(Issuer { shared: self.shared.clone(), cid_lifetime })
    }

    /// For quinn::ServerConfig::new: any server with the same key file accepts this one's Retry tokens.
    pub fn token_key(&self) -> Arc<dyn HandshakeTokenKey> {
        Arc::new(TokenKeys::new(&self.token_keys))
    }

    /// Any server with the same key file accepts this one's session tickets, and the other way round.
    pub fn share_tickets(&self, tls: &mut rustls::ServerConfig) {
        tls.ticketer = Arc::new(Tickets::new(&self.token_keys));
    }
}

impl State {
    /// Why a running server does not take a configuration, although there is no mistake in it.
    fn obstacle(&self, config: &ServerConfig) -> Option<String> {
        let now = &self.config;
        if let (Some(made), Some(in_force)) = (&config.made, &now.made)
            && made < in_force
        {
            return Some(format!("made: {made}: older than the configuration in force, of {in_force}"));
        }
        let lost = |key| Some(format!("{key}: missing: there is one in force, and to be without takes a restart"));
        if config.cid.is_none() && now.cid.is_some() {
            return lost("cid-config");
        }
        if config.reset_key.is_none() && now.reset_key.is_some() {
            return lost("reset-key-file");
        }
        let was_left = self.left.iter().any(|left| left.has_same_cids(config)) && !now.has_same_cids(config);
        (config.made.is_none() && was_left).then(|| {
            "cid-config: this process has left it for another already: expected a file that says when it was made"
                .into()
        })
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn sign(&self, cid: &[u8]) -> hmac::Tag {
        let state = self.state();
        hmac::sign(state.generator.reset_key(cid).unwrap_or(&self.process_key), cid)
    }
}

/// quinn asks this for stateless reset tokens, and takes the first 16 octets. So each has its configuration's key.
impl HmacKey for Shared {
    fn sign(&self, data: &[u8], signature_out: &mut [u8]) {
        signature_out.copy_from_slice(Shared::sign(self, data).as_ref());
    }

    fn signature_len(&self) -> usize {
        32
    }

    fn verify(&self, data: &[u8], signature: &[u8]) -> Result<(), CryptoError> {
        let state = self.state();
        let key = state.generator.reset_key(data).unwrap_or(&self.process_key);
        hmac::verify(key, data, signature).map_err(|_| CryptoError)
    }
}

struct Issuer {
    shared: Arc<Shared>,
    cid_lifetime: Option<Duration>,
}

impl ConnectionIdGenerator for Issuer {
    fn generate_cid(&mut self) -> ConnectionId {
        ConnectionId::new(&self.shared.state().generator.issue())
    }

    /// quinn asks before it sends a stateless reset: only connection IDs with this server's ID get one.
    fn validate(&self, cid: &ConnectionId) -> Result<(), InvalidCid> {
        if self.shared.state().generator.may_reset(cid) { Ok(()) } else { Err(InvalidCid) }
    }

    fn cid_len(&self) -> usize {
        self.shared.state().generator.length()
    }

    fn cid_lifetime(&self) -> Option<Duration> {
        self.cid_lifetime
    }
}

fn fresh_key() -> [u8; 32] {
    let mut key = [0; 32];
    key.copy_from_slice(&random(32));
    key
}
