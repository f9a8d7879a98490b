//! A small HTTP/3 server that a QUIC-LB balancer can route to, made of quinn, h3 and this crate.

mod options;
mod resources;

use std::io::Write;
use std::net::UdpSocket;
use std::path::Path;
use std::process::exit;
use std::sync::Arc;
use std::time::Duration;

use quiclb::{Mistakes, Routable};
use quinn::crypto::rustls::QuicServerConfig;
use quinn::{Endpoint, Incoming, ServerConfig, TokioRuntime, TransportConfig, VarInt};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::select;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

use options::Options;
use resources::Site;

const GRACE: Duration = Duration::from_millis(500); // for requests that are being answered when the server ends
const H3_NO_ERROR: VarInt = VarInt::from_u32(0x100);

#[tokio::main]
async fn main() {
    let options = Options::parse(std::env::args().skip(1)).unwrap_or_else(|why| fail("server", &why.into()));
    let name = options.name.clone();
    if let Err(mistakes) = run(options).await {
        fail(name.as_deref().unwrap_or("server"), &mistakes);
    }
}

fn fail(name: &str, mistakes: &Mistakes) -> ! {
    say(name, mistakes);
    exit(2);
}

fn say(name: &str, what: &Mistakes) {
    for line in what.to_string().lines() {
        eprintln!("{name}: {line}");
    }
}

async fn run(options: Options) -> Result<(), Mistakes> {
    let routable = Arc::new(Routable::load(&options.server_config, options.token_key_file.as_deref())?);
    let name = options.name.clone().unwrap_or_else(|| routable.name());
    let site = Arc::new(Site { name, routable });
    let config = server_config(&options, &site.routable)?;
    let mut hangups = signal(SignalKind::hangup()).map_err(|error| error.to_string())?;
    let mut terminations = signal(SignalKind::terminate()).map_err(|error| error.to_string())?;
    let mut interrupts = signal(SignalKind::interrupt()).map_err(|error| error.to_string())?;

    let (stop, stopping) = watch::channel(false);
    let mut endpoints = Vec::new();
    let mut ready = "ready".to_owned();
    for address in &options.listen {
        let socket = UdpSocket::bind(address).map_err(|error| format!("--listen: {address}: {error}"))?;
        let endpoint_config = site.routable.endpoint_config(options.cid_lifetime);
        let endpoint = Endpoint::new(endpoint_config, Some(config.clone()), socket, Arc::new(TokioRuntime))
            .map_err(|error| format!("--listen: {address}: {error}"))?;
        let local = endpoint.local_addr().map_err(|error| error.to_string())?;
        ready += &format!(" {local}");
        tokio::spawn(accept(endpoint.clone(), site.clone(), options.retry, stopping.clone()));
        endpoints.push(endpoint);
    }
    println!("{ready}");
    std::io::stdout().flush().map_err(|error| error.to_string())?;

    loop {
        select! {
            _ = hangups.recv() => match site.routable.reload() {
                Ok(()) => say(&site.name, &"new configuration in force".to_owned().into()),
                Err(Mistakes(lines)) => {
                    say(&site.name, &Mistakes([vec!["the configuration in force stays".into()], lines].concat()));
                }
            },
            _ = terminations.recv() => break,
            _ = interrupts.recv() => break,
        }
    }
    let _ = stop.send(true); // GOAWAY on every connection
    let idle = async {
        for endpoint in &endpoints {
            endpoint.set_server_config(None); // no new ones
            endpoint.wait_idle().await;
        }
    };
    let _ = timeout(GRACE, idle).await;
    for endpoint in &endpoints {
        endpoint.close(H3_NO_ERROR, b"");
    }
    sleep(Duration::from_millis(20)).await; // in which the closing packets are sent
    Ok(())
}

fn server_config(options: &Options, routable: &Routable) -> Result<ServerConfig, Mistakes> {
    let unreadable =
        |path: &Path, why: &dyn std::fmt::Display| Mistakes::from(format!("{}: no PEM: {why}", path.display()));
    let certificates = CertificateDer::pem_file_iter(&options.cert)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|why| unreadable(&options.cert, &why))?;
    let key = PrivateKeyDer::from_pem_file(&options.key).map_err(|why| unreadable(&options.key, &why))?;
    let mut tls = rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map(|builder| builder.with_no_client_auth())
        .and_then(|builder| builder.with_single_cert(certificates, key))
        .map_err(|why| unreadable(&options.cert, &why))?;
    tls.alpn_protocols = vec![b"h3".to_vec()];
    routable.share_tickets(&mut tls);
    let crypto = QuicServerConfig::try_from(tls).map_err(|why| why.to_string())?;
    let mut config = ServerConfig::new(Arc::new(crypto), routable.token_key());
    let mut transport = TransportConfig::default();
    let idle_timeout = options.idle_timeout.try_into().map_err(|_| "--idle-timeout: too long".to_owned())?;
    transport.max_idle_timeout(Some(idle_timeout));
    config.transport_config(Arc::new(transport));
    Ok(config)
}

async fn accept(endpoint: Endpoint, site: Arc<Site>, retry: bool, stopping: watch::Receiver<bool>) {
    while let Some(incoming) = endpoint.accept().await {
        if retry && !incoming.remote_address_validated() && incoming.may_retry() {
            let _ = incoming.retry(); // fails only for connections that came with a Retry token
            continue;
        }
        tokio::spawn(serve(incoming, site.clone(), stopping.clone()));
    }
}

/// Answer the requests of one connection until it ends. What goes wrong on it is the client's to see.
async fn serve(incoming: Incoming, site: Arc<Site>, mut stopping: watch::Receiver<bool>) {
    let Ok(connection) = incoming.await else { return };
    let quic = h3_quinn::Connection::new(connection.clone());
    let Ok(mut http) = h3::server::Connection::new(quic).await else { return };
    let mut is_stopping = false;
    loop {
        let accepted = select! {
            accepted = http.accept() => accepted,
            _ = stopping.changed(), if !is_stopping => {
                is_stopping = true;
                if http.shutdown(0).await.is_err() {
                    return;
                }
                continue;
            }
        };
        let Ok(Some(resolver)) = accepted else { return };
        let (site, connection) = (site.clone(), connection.clone());
        tokio::spawn(async move {
            if let Ok((request, stream)) = resolver.resolve_request().await {
                resources::serve(&site, &connection, &request, stream).await;
            }
        });
    }
}
