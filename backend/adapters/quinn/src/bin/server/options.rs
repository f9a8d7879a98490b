//! What the server is started with.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

pub const USAGE: &str = "expected --listen IP:PORT [--listen IP:PORT] --server-config FILE --cert PEM --key PEM \
    [--name NAME] [--retry] [--token-key-file FILE] [--idle-timeout SECONDS] [--cid-lifetime SECONDS]";

const IDLE_TIMEOUT: Duration = Duration::from_secs(30);

pub struct Options {
    pub listen: Vec<SocketAddr>,
    pub server_config: PathBuf,
    pub cert: PathBuf,
    pub key: PathBuf,
    pub name: Option<String>,
    pub retry: bool,
    pub token_key_file: Option<PathBuf>,
    pub idle_timeout: Duration,
    /// After which a client is given another connection ID in place of each.
    pub cid_lifetime: Option<Duration>,
}

impl Options {
    pub fn parse(mut words: impl Iterator<Item = String>) -> Result<Self, String> {
        let (mut listen, mut server_config, mut cert, mut key) = (Vec::new(), None, None, None);
        let (mut name, mut token_key_file, mut retry) = (None, None, false);
        let (mut idle_timeout, mut cid_lifetime) = (IDLE_TIMEOUT, None);
        while let Some(option) = words.next() {
            let mut value = || words.next().ok_or_else(|| format!("{option}: nothing after it; {USAGE}"));
            match option.as_str() {
                "--listen" => {
                    let address = value()?;
                    listen.push(address.parse().map_err(|_| format!("--listen: {address}: expected IP:PORT"))?);
                }
                "--server-config" => server_config = Some(value()?.into()),
                "--cert" => cert = Some(value()?.into()),
                "--key" => key = Some(value()?.into()),
                "--name" => name = Some(value()?),
                "--retry" => retry = true,
                "--token-key-file" => token_key_file = Some(value()?.into()),
                "--idle-timeout" => idle_timeout = seconds(&option, &value()?)?,
                "--cid-lifetime" => cid_lifetime = Some(seconds(&option, &value()?)?),
                _ => return Err(format!("{option}: unknown; {USAGE}")),
            }
        }
        match (server_config, cert, key) {
            (Some(server_config), Some(cert), Some(key)) if !listen.is_empty() => Ok(Self {
                listen,
                server_config,
                cert,
                key,
                name,
                retry,
                token_key_file,
                idle_timeout,
                // Longer than a connection may be idle: replacing connection IDs keeps it alive.
                cid_lifetime: cid_lifetime.or(Some(idle_timeout + idle_timeout / 2)),
            }),
            _ => Err(USAGE.into()),
        }
    }
}

fn seconds(option: &str, written: &str) -> Result<Duration, String> {
    let seconds = written.parse().ok().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    seconds.filter(|it| !it.is_zero()).ok_or_else(|| format!("{option}: {written}: expected a number of seconds"))
}
