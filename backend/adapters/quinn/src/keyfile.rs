//! Files of keys, as hex digits: nobody but the operator may read them, and no message repeats what is in them.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use crate::hex;

const MAX_KEY_FILE: u64 = 4096; // octets
const MAX_TOKEN_KEYS: usize = 8;

/// The key of N octets in a file.
pub fn read_key<const N: usize>(path: &Path) -> Result<[u8; N], String> {
    parse_key(path, read_secret(path)?.trim())
}

/// The keys in a file, one to eight lines of 64 hex digits, the newest first; empty lines do not count.
pub fn read_token_keys(path: &Path) -> Result<Vec<[u8; 32]>, String> {
    let mut keys = Vec::new();
    for line in read_secret(path)?.lines().map(str::trim).filter(|line| !line.is_empty()) {
        let key = parse_key(path, line)?;
        if keys.contains(&key) {
            return Err(format!("{}: holds one key twice", path.display()));
        }
        keys.push(key);
    }
    if keys.is_empty() || keys.len() > MAX_TOKEN_KEYS {
        return Err(format!("{}: holds {} keys: expected 1 to {MAX_TOKEN_KEYS}", path.display(), keys.len()));
    }
    Ok(keys)
}

/// The text of a regular file of at most `limit` octets.
pub fn read_text(path: &Path, limit: u64) -> Result<String, String> {
    let name = path.display();
    if !fs::metadata(path).map_err(|error| unreadable(path, &error))?.is_file() {
        return Err(format!("{name}: not a regular file")); // opening a pipe would wait for ever
    }
    let mut octets = Vec::new();
    let file = File::open(path).map_err(|error| unreadable(path, &error))?;
    file.take(limit + 1).read_to_end(&mut octets).map_err(|error| unreadable(path, &error))?;
    if octets.len() as u64 > limit {
        return Err(format!("{name}: more than {limit} octets"));
    }
    String::from_utf8(octets).map_err(|_| format!("{name}: not UTF-8"))
}

pub fn unreadable(path: &Path, error: &io::Error) -> String {
    format!("{}: cannot be read: {error}", path.display())
}

fn parse_key<const N: usize>(path: &Path, digits: &str) -> Result<[u8; N], String> {
    let (name, expected) = (path.display(), 2 * N);
    if digits.len() != expected {
        let found = digits.len();
        return Err(format!("{name}: holds {found} characters: expected {expected} hex digits ({N} octets)"));
    }
    hex::decode(digits)
        .and_then(|octets| octets.try_into().ok())
        .ok_or_else(|| format!("{name}: holds something else than hex digits: expected {expected} of them"))
}

fn read_secret(path: &Path) -> Result<String, String> {
    let mode = fs::metadata(path).map_err(|error| unreadable(path, &error))?.permissions().mode() & 0o777;
    if mode & 0o007 != 0 {
        return Err(format!("{}: mode {mode:04o} lets everybody at it: expected 0600 or 0640", path.display()));
    }
    read_text(path, MAX_KEY_FILE)
}
