//! Nonce marks in one small file, so that a restarted server repeats no nonce: the format of lb/highwater.py.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use num_bigint::BigUint;
use ring::digest::{SHA256, digest};
use serde_json::Value;

use crate::cid::KEY_LENGTH;
use crate::hex;
use crate::keyfile::unreadable;

const FORMAT: &str = "quiclb nonce marks 1";
const LARGEST: u64 = 16 << 20; // octets

/// How far a counter may have come: nonces `start` to `start + reserved - 1` are spent.
#[derive(Clone)]
pub struct Mark {
    pub start: BigUint,
    pub reserved: BigUint,
    /// Hides the counter of a plaintext configuration; encrypted ones have none.
    pub permutation_key: Option<[u8; KEY_LENGTH]>,
}

pub type Marks = BTreeMap<String, Mark>;

/// The marks of a file that belongs to this process as long as this value lives.
pub struct MarksFile {
    pub path: PathBuf,
    pub marks: Marks,
    _lock: File,
}

impl MarksFile {
    /// Fails if another process has the file, if others may read it, or if it is damaged: what is lost cannot be
    /// guessed. No file is a fresh start.
    pub fn open(path: &Path) -> Result<Self, String> {
        // The file's own inode changes with every write, so the lock is on one that stays.
        let lock_path = beside(path, ".lock");
        let lock = private().read(true).open(&lock_path).map_err(|error| unreadable(&lock_path, &error))?;
        lock.try_lock().map_err(|error| match error {
            TryLockError::Error(error) => unreadable(&lock_path, &error),
            TryLockError::WouldBlock => format!(
                "{}: in use by another process; every process needs a nonce file and server IDs of its own",
                path.display()
            ),
        })?;
        Ok(Self { path: path.to_owned(), marks: read(path)?, _lock: lock })
    }

    /// Keep a mark; it is durable on return.
    pub fn save(&mut self, identity: &str, mark: &Mark) -> io::Result<()> {
        let mut marks = self.marks.clone();
        marks.insert(identity.to_owned(), mark.clone());
        let temporary = beside(&self.path, ".new");
        let mut file = private().truncate(true).open(&temporary)?;
        file.set_permissions(fs::Permissions::from_mode(0o600))?;
        file.write_all(dump(&marks).as_bytes())?;
        file.sync_all()?;
        fs::rename(&temporary, &self.path)?;
        File::open(self.path.parent().filter(|it| *it != Path::new("")).unwrap_or(Path::new(".")))?.sync_all()?;
        self.marks = marks;
        Ok(())
    }
}

fn private() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.write(true).create(true).mode(0o600).custom_flags(libc::O_NOFOLLOW);
    options
}

fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

fn read(path: &Path) -> Result<Marks, String> {
    let name = path.display();
    let file = match OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Marks::new()),
        other => other.map_err(|error| unreadable(path, &error))?,
    };
    let status = file.metadata().map_err(|error| unreadable(path, &error))?;
    if !status.is_file() {
        return Err(format!("{name}: expected a regular file"));
    }
    let mode = status.permissions().mode() & 0o777;
    if mode & 0o077 != 0 {
        return Err(format!("{name}: mode {mode:04o}, expected 0600; it holds secrets"));
    }
    let mut content = String::new();
    let length = file.take(LARGEST + 1).read_to_string(&mut content).map_err(|error| unreadable(path, &error))?;
    // The reason is not told: it may quote a key.
    parse(&content).filter(|_| length as u64 <= LARGEST).ok_or_else(|| {
        format!(
            "{name}: damaged, so that it no longer says which nonces are spent. Restore the newest copy of it, or give \
             this server new server IDs (or new keys) and then delete it"
        )
    })
}

fn parse(content: &str) -> Option<Marks> {
    let document: Value = serde_json::from_str(content).ok()?;
    let mut marks = Marks::new();
    for (identity, fields) in document.get("marks")?.as_object()? {
        let number = |name: &str| fields.get(name)?.as_number()?.to_string().parse::<BigUint>().ok();
        let key = hex::decode(fields.get("permutation_key")?.as_str()?)?;
        let permutation_key = if key.is_empty() { None } else { Some(key.try_into().ok()?) };
        marks
            .insert(identity.clone(), Mark { start: number("start")?, reserved: number("reserved")?, permutation_key });
    }
    let is_ours = document.get("format")? == FORMAT && document.get("sha256")?.as_str()? == sha256(&marks);
    is_ours.then_some(marks)
}

fn dump(marks: &Marks) -> String {
    let digest = sha256(marks);
    let table = table(marks, [": ", ",\n "]);
    format!("{{\n \"format\": \"{FORMAT}\",\n \"sha256\": \"{digest}\",\n \"marks\": {table}\n}}\n")
}

fn sha256(marks: &Marks) -> String {
    hex::encode(digest(&SHA256, table(marks, [":", ","]).as_bytes()).as_ref())
}

/// Marks as JSON, sorted. The digest is of the form without spaces.
fn table(marks: &Marks, [colon, comma]: [&str; 2]) -> String {
    let entries = marks.iter().map(|(identity, mark)| {
        let key = mark.permutation_key.map(|key| hex::encode(&key)).unwrap_or_default();
        let fields = [
            format!("\"permutation_key\"{colon}\"{key}\""),
            format!("\"reserved\"{colon}{}", mark.reserved),
            format!("\"start\"{colon}{}", mark.start),
        ];
        format!("{}{colon}{{{}}}", Value::from(identity.as_str()), fields.join(comma))
    });
    format!("{{{}}}", entries.collect::<Vec<_>>().join(comma))
}
