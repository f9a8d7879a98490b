//! What every server of quiclb's tests serves.

use std::net::SocketAddr;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use bytes::{Buf, Bytes};
use h3::error::StreamError;
use h3::server::RequestStream;
use h3_quinn::BidiStream;
use http::{Method, Request, Response, StatusCode};
use quiclb::{Routable, hex};
use quinn::Connection;
use ring::digest::{Context, SHA256};
use serde_json::json;
use tokio::time::interval;

const MAX_OCTETS: u64 = 1 << 34;
const MAX_SECONDS: f64 = 3600.0;
const TICK: Duration = Duration::from_millis(50);

static CHUNK: LazyLock<Bytes> = LazyLock::new(|| (0..1 << 16).map(|i| i as u8).collect());

type Stream = RequestStream<BidiStream<Bytes>, Bytes>;

/// What the server says about itself.
pub struct Site {
    pub name: String,
    pub routable: Arc<Routable>,
}

/// Answer one request, whatever it is.
pub async fn serve(site: &Site, connection: &Connection, request: &Request<()>, mut stream: Stream) {
    if respond(site, connection, request, &mut stream).await.is_err() {
        return; // the client has given up
    }
    // A stream whose end was not read is reset when it is dropped, and some clients take that for a failure.
    while let Ok(Some(_)) = stream.recv_data().await {}
}

async fn respond(
    site: &Site,
    connection: &Connection,
    request: &Request<()>,
    stream: &mut Stream,
) -> Result<(), StreamError> {
    let path = request.uri().path().strip_prefix('/').unwrap_or_default();
    let (resource, argument) = path.split_once('/').unwrap_or((path, ""));
    let is_reading = matches!(*request.method(), Method::GET | Method::HEAD);
    match resource {
        "whoami" if is_reading && argument.is_empty() => {
            let client = connection.remote_address();
            let client = SocketAddr::new(client.ip().to_canonical(), client.port());
            let server_id = hex::encode(&site.routable.server_id());
            let answer = json!({"name": site.name, "server_id": server_id, "client": client.to_string()});
            whole(stream, StatusCode::OK, "application/json", format!("{answer}\n")).await
        }
        "bytes" if is_reading => match argument.parse().ok().filter(|count| *count <= MAX_OCTETS) {
            Some(count) => octets(stream, count).await,
            None => text(stream, StatusCode::BAD_REQUEST, "expected a number of octets").await,
        },
        "slow" if is_reading => match argument.parse().ok().filter(|it| (0.0..=MAX_SECONDS).contains(it)) {
            Some(seconds) => slow(stream, seconds).await,
            None => text(stream, StatusCode::BAD_REQUEST, "expected a number of seconds").await,
        },
        "status" if is_reading => match argument.parse().ok().filter(|code| (200..600).contains(code)) {
            Some(code) => text(stream, StatusCode::from_u16(code).unwrap_or_default(), "").await,
            None => text(stream, StatusCode::BAD_REQUEST, "expected a status code from 200 to 599").await,
        },
        "upload" if argument.is_empty() && matches!(*request.method(), Method::PUT | Method::POST) => {
            upload(stream).await
        }
        _ => text(stream, StatusCode::NOT_FOUND, "no such resource").await,
    }
}

async fn octets(stream: &mut Stream, count: u64) -> Result<(), StreamError> {
    let response = Response::builder().header("content-type", "application/octet-stream");
    let response = response.header("content-length", count).body(()).expect("a valid response");
    stream.send_response(response).await?;
    let mut rest = count;
    while rest > 0 {
        let chunk = CHUNK.slice(..rest.min(CHUNK.len() as u64) as usize);
        rest -= chunk.len() as u64;
        stream.send_data(chunk).await?;
    }
    stream.finish().await
}

async fn slow(stream: &mut Stream, seconds: f64) -> Result<(), StreamError> {
    let response = Response::builder().header("content-type", "text/plain; charset=utf-8");
    stream.send_response(response.body(()).expect("a valid response")).await?;
    let mut ticks = interval(TICK);
    ticks.tick().await;
    for line in 0..(seconds / TICK.as_secs_f64()).round() as u64 {
        stream.send_data(format!("{line}\n").into()).await?;
        ticks.tick().await;
    }
    stream.send_data(Bytes::from_static(b"end\n")).await?;
    stream.finish().await
}

async fn upload(stream: &mut Stream) -> Result<(), StreamError> {
    let (mut count, mut digest) = (0, Context::new(&SHA256));
    while let Some(mut data) = stream.recv_data().await? {
        while data.has_remaining() {
            let chunk = data.chunk();
            digest.update(chunk);
            let length = chunk.len();
            count += length;
            data.advance(length);
        }
    }
    let answer = json!({"octets": count, "sha256": hex::encode(digest.finish().as_ref())});
    whole(stream, StatusCode::OK, "application/json", format!("{answer}\n")).await
}

async fn text(stream: &mut Stream, status: StatusCode, line: &str) -> Result<(), StreamError> {
    let body = if line.is_empty() { String::new() } else { format!("{line}\n") };
    whole(stream, status, "text/plain; charset=utf-8", body).await
}

async fn whole(stream: &mut Stream, status: StatusCode, kind: &str, body: String) -> Result<(), StreamError> {
    let response = Response::builder().status(status).header("content-type", kind);
    stream.send_response(response.body(()).expect("a valid response")).await?;
    if !body.is_empty() {
        stream.send_data(body.into()).await?;
    }
    stream.finish().await
}
