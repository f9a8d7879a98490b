//! A server's files, its connection IDs and their tokens, as quinn gets them.

use std::collections::HashSet;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::thread;

use quiclb::Routable;
use quiclb::cid::{CidConfig, Codec};
use quiclb::config::ServerConfig;
use quiclb::generator::{Generator, reset_token};
use ring::hmac;

const SERVER_ID: [u8; 3] = [0xa1, 0xb2, 0xc3];

/// A directory of one test's own, which goes when the test does.
struct Place(PathBuf);

impl Place {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("quiclb-{}-{name}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir(&path).unwrap();
        let place = Self(path);
        for (id, key) in [(0, "11"), (1, "22")] {
            place.secret(&format!("cid-{id}.key"), &key.repeat(16));
            place.secret(&format!("reset-{id}.key"), &key.repeat(32));
        }
        place
    }

    fn secret(&self, name: &str, digits: &str) {
        fs::write(self.0.join(name), format!("{digits}\n")).unwrap();
        fs::set_permissions(self.0.join(name), Permissions::from_mode(0o600)).unwrap();
    }

    fn server(&self, config_id: u8, more: &str) -> PathBuf {
        let text = format!(
            "# made by hand\nname: web\ncid-config:\n  config-id: {config_id}\n  server-id-length: 3\n  nonce-length: 4\n  \
             key-file: cid-{config_id}.key\nserver-id: \"a1b2c3\"\nreset-key-file: reset-{config_id}.key\n{more}"
        );
        let path = self.0.join("server.yaml");
        fs::write(&path, text).unwrap();
        path
    }

    fn codec(&self, config_id: u8) -> Codec {
        Codec::new(CidConfig {
            config_id,
            server_id_length: 3,
            nonce_length: 4,
            key: Some([if config_id == 0 { 0x11 } else { 0x22 }; 16]),
            encodes_length: true,
            appended_length: 0,
        })
        .unwrap()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn mistakes(path: &Path) -> String {
    ServerConfig::load(path).err().expect("a mistake").to_string()
}

fn token(routable: &Routable, cid: &[u8]) -> Vec<u8> {
    let mut signature = vec![0; 32];
    routable.reset_keys().sign(cid, &mut signature);
    signature[..16].to_vec()
}

#[test]
fn every_connection_id_has_the_server_id_and_a_nonce_of_its_own() {
    let place = Place::new("nonces");
    let routable = Routable::load(&place.server(0, ""), None).unwrap();
    let issued: Vec<Vec<u8>> = thread::scope(|scope| {
        let threads: Vec<_> = (0..4)
            .map(|_| {
                scope.spawn(|| {
                    let mut issuer = routable.issuer(None);
                    (0..500).map(|_| issuer.generate_cid().to_vec()).collect::<Vec<_>>()
                })
            })
            .collect();
        threads.into_iter().flat_map(|each| each.join().unwrap()).collect()
    });
    let codec = place.codec(0);
    let nonces: HashSet<_> = issued
        .iter()
        .map(|cid| {
            let (server_id, nonce) = codec.decode(cid).unwrap();
            assert_eq!(server_id, SERVER_ID);
            assert_eq!((cid.len(), cid[0]), (8, 7));
            nonce
        })
        .collect();
    assert_eq!(nonces.len(), 2000);
}

#[test]
fn a_reload_changes_connection_ids_and_each_has_its_own_configuration_s_token() {
    let place = Place::new("reload");
    let routable = Routable::load(&place.server(0, ""), None).unwrap();
    let mut issuer = routable.issuer(None);
    let old = issuer.generate_cid();
    place.server(1, "");
    routable.reload().unwrap();
    let new = issuer.generate_cid();
    assert_eq!(place.codec(1).decode(&new).unwrap().0, SERVER_ID);
    for (cid, key) in [(old, [0x11; 32]), (new, [0x22; 32])] {
        let key = hmac::Key::new(hmac::HMAC_SHA256, &key);
        assert_eq!(token(&routable, &cid), reset_token(&key, &cid));
        assert!(issuer.validate(&cid).is_ok());
    }
    place.server(0, "");
    assert!(routable.reload().unwrap_err().to_string().contains("cid-config: this process has left it"));
    place.server(0, "made: \"2026-02-01T00:00:00Z\"\n");
    routable.reload().unwrap();
    assert_eq!(issuer.generate_cid()[0] >> 5, 0);
}

#[test]
fn a_running_server_loses_neither_its_configuration_nor_its_reset_key() {
    let place = Place::new("loses");
    let path = place.server(0, "");
    let text = fs::read_to_string(&path).unwrap();
    let routable = Routable::load(&path, None).unwrap();
    for (less, reason) in [
        ("name: web\n", "cid-config: missing"),
        (&text.replace("reset-key-file: reset-0.key\n", ""), "reset-key-file: missing"),
    ] {
        fs::write(&path, less).unwrap();
        assert!(routable.reload().unwrap_err().to_string().contains(reason));
    }
}

#[test]
fn only_own_connection_ids_may_be_reset() {
    let place = Place::new("foreign");
    let routable = Routable::load(&place.server(0, ""), None).unwrap();
    let issuer = routable.issuer(None);
    let codec = place.codec(0);
    let is_answered = |cid: &[u8]| issuer.validate(&quinn::ConnectionId::new(cid)).is_ok();
    assert!(is_answered(&codec.encode(&SERVER_ID, &[0; 4], 0, &[])));
    assert!(!is_answered(&codec.encode(&[0xa1, 0xb2, 0xc4], &[0; 4], 0, &[])));
    assert!(!is_answered(&place.codec(1).encode(&SERVER_ID, &[0; 4], 0, &[])));
    assert!(!is_answered(&[0xe7; 8]));
}

#[test]
fn a_mistaken_or_stale_file_changes_nothing() {
    let place = Place::new("mistakes");
    let routable = Routable::load(&place.server(0, "made: \"2026-02-01T00:00:00Z\"\n"), None).unwrap();
    let mut issuer = routable.issuer(None);
    for (config_id, more, reason) in [
        (1, "colour: red\n", "colour: unknown key"),
        (1, "nonce-file: nonces\n", "nonce-file: another one"),
        (1, "made: \"2026-01-31T23:59:59Z\"\n", "made: 2026-01-31T23:59:59Z: older"),
    ] {
        place.server(config_id, more);
        assert!(routable.reload().unwrap_err().to_string().contains(reason), "{reason}");
        assert_eq!(issuer.generate_cid()[0] >> 5, 0);
    }
    place.secret("cid-1.key", "2");
    place.server(1, "");
    assert!(routable.reload().unwrap_err().to_string().contains("cid-1.key: holds 1 characters"));
    assert_eq!(issuer.generate_cid()[0] >> 5, 0);
}

#[test]
fn a_connection_id_of_another_length_takes_a_restart() {
    let place = Place::new("length");
    let path = place.server(0, "");
    let routable = Routable::load(&path, None).unwrap();
    fs::write(&path, fs::read_to_string(&path).unwrap().replace("nonce-length: 4", "nonce-length: 5")).unwrap();
    assert!(routable.reload().unwrap_err().to_string().contains("9 octets instead of 8"));
}

#[test]
fn files_are_refused_with_every_reason() {
    let place = Place::new("refused");
    let path = place.server(0, "");
    let good = fs::read_to_string(&path).unwrap();
    for (from, to, reasons) in [
        ("config-id: 0", "config-id: 7", &["cid-config.config-id: 7: expected an integer, 0 to 6"][..]),
        ("config-id: 0", "config-id: 00", &["cid-config.config-id: 00: expected"]),
        ("nonce-length: 4", "nonce-length: 17", &["cid-config: server ID and nonce take 20 octets"]),
        ("\"a1b2c3\"", "\"a1b2\"", &["server-id: 2 octets, but"]),
        ("\"a1b2c3\"", "101010", &["server-id: expected a text"]),
        ("\"a1b2c3\"", "!!str a1b2c3", &["server-id: expected a text"]),
        ("name: web", "name: web\nname: bew", &["name: given twice"]),
        ("name: web", "names: web", &["names: unknown key", "name: expected a name"]),
        ("name: web", "name: [web]", &["name: expected a text"]),
        (
            "cid-0.key",
            "\"11111111111111111111111111111111\"",
            &["cid-config.key-file: <hex digits>: expected the name"],
        ),
        ("name: web", "name: [", &["not YAML"]),
        ("# made by hand", "---\n---", &["a second document"]),
    ] {
        assert!(good.contains(from));
        fs::write(&path, good.replacen(from, to, 1)).unwrap();
        let found = mistakes(&path);
        assert!(reasons.iter().all(|reason| found.contains(reason)), "{to}: {found}");
    }
    fs::write(&path, good).unwrap();
    fs::set_permissions(place.0.join("reset-0.key"), Permissions::from_mode(0o644)).unwrap();
    assert!(mistakes(&path).contains("reset-0.key: mode 0644"));
}

#[test]
fn marks_outlive_the_process_and_belong_to_one_at_a_time() {
    let place = Place::new("marks");
    let config = ServerConfig::load(&place.server(0, "nonce-file: nonces\n")).unwrap();
    let mut issued = HashSet::new();
    for _ in 0..3 {
        let mut generator = Generator::new(&config).unwrap();
        assert!(Generator::new(&config).err().unwrap().contains("in use by another process"));
        assert!((0..100).all(|_| issued.insert(generator.issue())));
    }
    let file = place.0.join("nonces");
    let text = fs::read_to_string(&file).unwrap();
    assert!(text.contains(&format!("\"reserved\": {}", 3 << 16)), "{text}");
    fs::write(&file, text.replacen("\"reserved\": 1", "\"reserved\": 2", 1)).unwrap();
    assert!(Generator::new(&config).err().unwrap().contains("damaged"));
}

#[test]
fn nonces_that_are_used_up_or_cannot_be_reserved_make_unroutable_connection_ids() {
    let place = Place::new("exhausted");
    let config = ServerConfig::load(&place.server(0, "nonce-file: nonces\n")).unwrap();
    let mut generator = Generator::new(&config).unwrap();
    fs::create_dir(place.0.join("nonces.new")).unwrap(); // nothing can be written in its place
    let cid = generator.issue();
    assert_eq!((cid.len(), cid[0]), (8, 0b1110_0111));
    fs::remove_dir(place.0.join("nonces.new")).unwrap();
    assert_eq!((0..64).map(|_| generator.issue()).filter(|cid| cid[0] == 7).count(), 1 + 64 - 63);
}
