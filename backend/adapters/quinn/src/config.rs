//! What one server has to know: the file that `quiclb server-config` writes, and the key files it names.

use std::fmt;
use std::path::{Path, PathBuf};

use saphyr_parser::{Event, Parser, ScalarStyle};

use crate::cid::CidConfig;
use crate::hex;
use crate::keyfile::{read_key, read_text};

const MAX_CONFIG_FILE: u64 = 1 << 20; // octets
const MAX_SHOWN: usize = 60;

/// A server. Without a CID configuration it has no server ID and issues unroutable connection IDs.
pub struct ServerConfig {
    pub name: String,
    pub cid: Option<CidConfig>,
    pub server_id: Vec<u8>,
    /// This server ID's own; without it there are no resets.
    pub reset_key: Option<[u8; 32]>,
    /// Says which nonces are spent, across restarts.
    pub nonce_file: Option<PathBuf>,
    /// When the file was made, as in 2026-01-31T12:00:00Z.
    pub made: Option<String>,
}

/// Everything that is wrong with a configuration, a line for each.
#[derive(Debug)]
pub struct Mistakes(pub Vec<String>);

impl From<String> for Mistakes {
    fn from(mistake: String) -> Self {
        Self(vec![mistake])
    }
}

impl fmt::Display for Mistakes {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0.join("\n"))
    }
}

impl std::error::Error for Mistakes {}

impl ServerConfig {
    pub fn load(path: &Path) -> Result<Self, Mistakes> {
        let text = read_text(path, MAX_CONFIG_FILE)?;
        let Node::Mapping(top) = parse(&text).map_err(|why| format!("{}: {why}", path.display()))? else {
            return Err(format!("{}: expected a mapping of keys to values", path.display()).into());
        };
        let directory = path.parent().unwrap_or(Path::new("."));
        let mut reading = Reading { directory, mistakes: Vec::new() };
        let config = reading.server(&top);
        if reading.mistakes.is_empty() { Ok(config) } else { Err(Mistakes(reading.mistakes)) }
    }

    /// Whether two servers make the same connection IDs.
    pub fn has_same_cids(&self, other: &Self) -> bool {
        self.cid == other.cid && self.server_id == other.server_id
    }
}

/// A part of a YAML file, with texts as they were written.
enum Node {
    Text {
        text: String,
        is_plain: bool,
    },
    Mapping(Mapping),
    /// A list, an alias or something with a tag, none of which has a use here.
    Other,
}

type Mapping = Vec<(String, Node)>;

fn parse(text: &str) -> Result<Node, String> {
    let mut parser = Parser::new_from_str(text);
    let mut next = move || match parser.next() {
        Some(Ok((event, _))) => Ok(event),
        Some(Err(error)) => {
            Err(format!("line {}, column {}: not YAML", error.marker().line(), error.marker().col() + 1))
        }
        None => Ok(Event::StreamEnd),
    };
    loop {
        match next()? {
            Event::DocumentStart(_) => break,
            Event::StreamEnd => return Err("nothing in it: expected a mapping of keys to values".into()),
            _ => {}
        }
    }
    let event = next()?;
    let root = node(event, &mut next, 1)?;
    next()?; // the end of the document
    match next()? {
        Event::StreamEnd => Ok(root),
        _ => Err("a second document after `---`: expected one".into()),
    }
}

fn node<'a>(
    event: Event<'a>,
    next: &mut impl FnMut() -> Result<Event<'a>, String>,
    depth: usize,
) -> Result<Node, String> {
    if depth > 16 {
        return Err("nested more than 16 deep".into());
    }
    let (mut found, is_tagged) = match event {
        Event::Scalar(text, style, anchor, tag) => {
            let is_plain = style == ScalarStyle::Plain;
            (Node::Text { text: text.into_owned(), is_plain }, anchor != 0 || tag.is_some())
        }
        Event::MappingStart(anchor, tag) => {
            let mut mapping = Mapping::new();
            loop {
                match next()? {
                    Event::MappingEnd => break,
                    key => {
                        let key = node(key, next, depth + 1)?;
                        let value = next()?;
                        let value = node(value, next, depth + 1)?;
                        mapping.push((if let Node::Text { text, .. } = key { text } else { "?".into() }, value));
                    }
                }
            }
            (Node::Mapping(mapping), anchor != 0 || tag.is_some())
        }
        Event::SequenceStart(..) => {
            loop {
                match next()? {
                    Event::SequenceEnd => break,
                    item => node(item, next, depth + 1)?,
                };
            }
            (Node::Other, false)
        }
        _ => (Node::Other, false),
    };
    if is_tagged {
        found = Node::Other;
    }
    Ok(found)
}

/// One file being read: where relative names start, and what was wrong so far.
struct Reading<'a> {
    directory: &'a Path,
    mistakes: Vec<String>,
}

impl Reading<'_> {
    fn mistake(&mut self, path: &str, message: impl fmt::Display) {
        self.mistakes.push(format!("{path}: {message}"));
    }

    fn server(&mut self, top: &Mapping) -> ServerConfig {
        self.keys(top, "", &["name", "cid-config", "server-id", "reset-key-file", "nonce-file", "made"]);
        let name = self.text(top, "", "name").unwrap_or_default();
        let is_name = |octet: u8| octet.is_ascii_alphanumeric() || b"._-".contains(&octet);
        if !(name.starts_with(|c: char| c.is_ascii_alphanumeric()) && name.len() <= 64 && name.bytes().all(is_name)) {
            self.mistake("name", "expected a name of up to 64 letters, digits, dots, hyphens and underscores");
        }
        let server_id = self.text(top, "", "server-id").map(|digits| {
            hex::decode(&digits).filter(|id| (1..=15).contains(&id.len())).unwrap_or_else(|| {
                let found = shown(&digits);
                self.mistake("server-id", format!("{found}: expected 1 to 15 octets, two hex digits each, in quotes"));
                Vec::new()
            })
        });
        let cid = match find(top, "cid-config") {
            None => None,
            Some(Node::Mapping(section)) => Some(self.cid(section)),
            Some(_) => {
                self.mistake("cid-config", "expected a mapping");
                None
            }
        };
        match (&cid, &server_id) {
            (Some(_), None) if find(top, "server-id").is_none() => {
                self.mistake("server-id", "missing: expected one, since there is a cid-config");
            }
            (None, Some(_)) => self.mistake("server-id", "a server ID without a cid-config: expected both or neither"),
            (Some(cid), Some(id)) if self.mistakes.is_empty() && id.len() != cid.server_id_length => {
                let (found, expected) = (id.len(), cid.server_id_length);
                let message = format!("{found} octets, but cid-config.server-id-length is {expected}");
                self.mistake("server-id", message);
            }
            _ => {}
        }
        let made = self.text(top, "", "made");
        if made.as_deref().is_some_and(|made| !is_time(made)) {
            self.mistake("made", "expected a time, as in \"2026-01-31T12:00:00Z\"");
        }
        ServerConfig {
            name,
            cid,
            server_id: server_id.unwrap_or_default(),
            reset_key: self.key(top, "", "reset-key-file"),
            nonce_file: self.file(top, "", "nonce-file"),
            made,
        }
    }

    fn cid(&mut self, section: &Mapping) -> CidConfig {
        const PATH: &str = "cid-config.";
        let before = self.mistakes.len();
        let known = ["config-id", "server-id-length", "nonce-length", "key-file", "encodes-length", "appended-length"];
        self.keys(section, PATH, &known);
        let mut config = CidConfig {
            config_id: self.integer(section, "config-id", 0..=6, None) as u8,
            server_id_length: self.integer(section, "server-id-length", 1..=15, None),
            nonce_length: self.integer(section, "nonce-length", 4..=18, None),
            key: None,
            encodes_length: true,
            appended_length: self.integer(section, "appended-length", 0..=14, Some(0)),
        };
        match find(section, "encodes-length") {
            None => {}
            Some(Node::Text { text, is_plain: true }) if text == "true" || text == "false" => {
                config.encodes_length = text == "true";
            }
            Some(_) => self.mistake("cid-config.encodes-length", "expected true or false"),
        }
        if self.mistakes.len() == before
            && let Err(why) = config.check()
        {
            self.mistake("cid-config", why);
        }
        config.key = self.key(section, PATH, "key-file");
        config
    }

    /// Keys that are not known, or given twice, are mistakes.
    fn keys(&mut self, mapping: &Mapping, path: &str, known: &[&str]) {
        for (i, (name, _)) in mapping.iter().enumerate() {
            if !known.contains(&name.as_str()) {
                self.mistake(&format!("{path}{}", shown(name)), "unknown key");
            } else if mapping[..i].iter().any(|(other, _)| other == name) {
                self.mistake(&format!("{path}{name}"), "given twice: expected once");
            }
        }
    }

    /// A value that YAML takes for a text: what looks like a number has to be quoted.
    fn text(&mut self, mapping: &Mapping, path: &str, name: &str) -> Option<String> {
        match find(mapping, name)? {
            Node::Text { text, is_plain } if !(*is_plain && is_no_text(text)) => Some(text.clone()),
            _ => {
                self.mistake(&format!("{path}{name}"), "expected a text; put numbers and the like in quotes");
                None
            }
        }
    }

    fn integer(
        &mut self,
        mapping: &Mapping,
        name: &str,
        range: std::ops::RangeInclusive<usize>,
        otherwise: Option<usize>,
    ) -> usize {
        let (low, high) = (*range.start(), *range.end());
        let path = format!("cid-config.{name}");
        match find(mapping, name) {
            None if otherwise.is_some() => return otherwise.unwrap_or(low),
            None => self.mistake(&path, format!("missing: expected an integer, {low} to {high}")),
            Some(Node::Text { text, is_plain: true }) => {
                let canonical = text.parse().ok().filter(|number: &usize| number.to_string() == *text);
                if let Some(number) = canonical.filter(|number| range.contains(number)) {
                    return number;
                }
                self.mistake(&path, format!("{}: expected an integer, {low} to {high}", shown(text)));
            }
            Some(_) => self.mistake(&path, format!("expected an integer, {low} to {high}")),
        }
        low
    }

    fn file(&mut self, mapping: &Mapping, path: &str, name: &str) -> Option<PathBuf> {
        let text = self.text(mapping, path, name)?;
        let looks_like_a_key = text.len() >= 32 && text.bytes().all(|octet| octet.is_ascii_hexdigit());
        if text.is_empty() || looks_like_a_key {
            self.mistake(&format!("{path}{name}"), format!("{}: expected the name of a file", shown(&text)));
            return None;
        }
        Some(self.directory.join(text))
    }

    fn key<const N: usize>(&mut self, mapping: &Mapping, path: &str, name: &str) -> Option<[u8; N]> {
        let file = self.file(mapping, path, name)?;
        read_key(&file).map_err(|why| self.mistake(&format!("{path}{name}"), why)).ok()
    }
}

fn find<'a>(mapping: &'a Mapping, name: &str) -> Option<&'a Node> {
    mapping.iter().find(|(key, _)| key == name).map(|(_, value)| value)
}

/// Whether YAML takes an unquoted text for something else.
fn is_no_text(text: &str) -> bool {
    const WORDS: [&str; 9] = ["", "~", "null", "true", "false", "yes", "no", "on", "off"];
    let number = text.replace('_', "");
    WORDS.contains(&text.to_lowercase().as_str())
        || number.parse::<f64>().is_ok()
        || ["0x", "0o"].iter().any(|prefix| number.starts_with(prefix))
}

/// Whether a text is as long, and of such characters, as 2026-01-31T12:00:00Z.
fn is_time(text: &str) -> bool {
    let pattern = b"0000-00-00T00:00:00Z";
    text.len() == pattern.len()
        && text.bytes().zip(pattern).all(|(found, wanted)| match wanted {
            b'0' => found.is_ascii_digit(),
            other => found == *other,
        })
}

/// A text as a mistake quotes it: not too long, and without anything that looks like a key.
fn shown(text: &str) -> String {
    let longest = text.split(|c: char| !c.is_ascii_hexdigit()).map(str::len).max().unwrap_or(0);
    if longest >= 32 {
        return "<hex digits>".into();
    }
    let shown: String = text.chars().take(MAX_SHOWN).flat_map(char::escape_debug).collect();
    if text.chars().count() > MAX_SHOWN { shown + "..." } else { shown }
}
