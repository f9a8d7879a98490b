//! Makes a quinn server routable by a QUIC-LB balancer: it reads the file that `quiclb server-config` writes, and gives
//! quinn's endpoint the connection IDs, stateless reset tokens, Retry tokens and session tickets that go with it.

pub mod cid;
pub mod config;
pub mod generator;
pub mod hex;
mod keyfile;
mod marks;
mod routable;
mod tokens;

pub use config::Mistakes;
pub use routable::Routable;
