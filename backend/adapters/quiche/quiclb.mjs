/**
 * What makes a server routable: connection IDs that carry its server ID, and their stateless reset tokens.
 *
 * Copy this file; it needs the npm package `yaml`, and knows nothing of quiche. The file that a server reads is what
 * `quiclb server-config` writes (docs/configuration.md, "A server"). The draft's sections are those of
 * draft-ietf-quic-load-balancers, the editors' copy after -21.
 */
import { spawnSync } from 'node:child_process';
import { createCipheriv, createDecipheriv, createHash, createHmac, randomBytes } from 'node:crypto';
import {
  closeSync, constants, fchmodSync, fstatSync, fsyncSync, openSync, readSync, renameSync, writeSync,
} from 'node:fs';
import { dirname, resolve } from 'node:path';
import { isMap, isScalar, parseAllDocuments, parseDocument, visit } from 'yaml';

export const MIN_CID = 8; // octets of a server's: those without a configuration have at least that many
export const MAX_CID = 20;
export const KEY_LENGTH = 16;
export const RESET_KEY_LENGTH = 32;
export const TOKEN_LENGTH = 16;
const AES_BLOCK = 16;
const UNROUTABLE = 7; // section 3.2
const MAX_FILE = 4 << 20;
const MAX_MARKS_FILE = 16 << 20;
const MAX_KEY_FILE = 1024;
const BLOCK = 1n << 16n; // nonces per reservation: one durable write, and at most as many lost in a crash
const RETRY_EVERY = 64; // connection IDs between two attempts at a nonce file that cannot be written
const FORMAT = 'quiclb nonce marks 1';
const NONE = Buffer.alloc(0);

/** Why a file is refused: a line for each mistake. No line holds a key. */
export class Refused extends Error {
  constructor(lines) {
    super(lines.join('\n'));
    this.lines = lines;
  }
}

// The wire format.

/**
 * @typedef {object} CidConfig How connection IDs with one config ID carry a server ID (section 5.3); lengths in octets.
 * @property {number} configId
 * @property {number} serverIdLength
 * @property {number} nonceLength
 * @property {number} appendedLength
 * @property {boolean} encodesLength
 * @property {Buffer | null} key 16 octets, or none
 */

export function cidLength(config) {
  return 1 + config.serverIdLength + config.nonceLength + config.appendedLength;
}

/** Encodes and decodes the connection IDs of one configuration. */
export class Codec {
  constructor(config) {
    this.config = config;
    this.cidLength = cidLength(config);
    this.blockLength = config.serverIdLength + config.nonceLength;
    const isSinglePass = this.blockLength === AES_BLOCK;
    if (config.key === null) {
      this.encrypt = this.decrypt = (block) => block;
    } else if (isSinglePass) {
      const encrypt = ecb(createCipheriv, config.key);
      const decrypt = ecb(createDecipheriv, config.key);
      this.encrypt = (block) => encrypt.update(block);
      this.decrypt = (block) => decrypt.update(block);
    } else {
      const fourPass = new FourPass(config.key);
      this.encrypt = (block) => fourPass.encrypt(block);
      this.decrypt = (block) => fourPass.decrypt(block);
    }
  }

  /** `lowBits` fill the five low bits of the first octet if it does not encode the length. */
  encode(serverId, nonce, lowBits = 0, appended = NONE) {
    const { configId, encodesLength } = this.config;
    const first = (configId << 5) | (encodesLength ? this.cidLength - 1 : lowBits & 0x1f);
    return Buffer.concat([Buffer.from([first]), this.encrypt(Buffer.concat([serverId, nonce])), appended]);
  }

  /** Server ID and nonce; null if the connection ID is too short or has another config ID. */
  decode(cid) {
    if (cid.length < 1 + this.blockLength || cid[0] >> 5 !== this.config.configId) return null;
    const text = this.decrypt(Buffer.from(cid.subarray(1, 1 + this.blockLength)));
    const border = this.config.serverIdLength;
    return { serverId: text.subarray(0, border), nonce: text.subarray(border) };
  }
}

/**
 * Section 5.4.2: a permutation of strings of 2 to 20 octets. Halves of an odd length share the middle octet: the left
 * one has its high nibble, the right one its low nibble.
 */
export class FourPass {
  constructor(key) {
    this.aes = ecb(createCipheriv, key);
  }

  encrypt(text) {
    return this.run(text, [1, 2, 3, 4]);
  }

  decrypt(text) {
    return this.run(text, [4, 3, 2, 1]);
  }

  run(text, passes) {
    const size = (text.length + 1) >> 1;
    const isOdd = text.length % 2 === 1;
    const left = Buffer.from(text.subarray(0, size));
    const right = Buffer.from(text.subarray(text.length - size));
    if (isOdd) {
      left[size - 1] &= 0xf0;
      right[0] &= 0x0f;
    }
    for (const number of passes) {
      const isFromLeft = number % 2 === 1;
      const block = Buffer.alloc(AES_BLOCK);
      (isFromLeft ? left : right).copy(block);
      block[AES_BLOCK - 2] = text.length;
      block[AES_BLOCK - 1] = number;
      const mask = this.aes.update(block);
      if (isOdd && isFromLeft) mask[0] &= 0x0f;
      if (isOdd && !isFromLeft) mask[size - 1] &= 0xf0;
      const half = isFromLeft ? right : left;
      for (let i = 0; i < size; i++) half[i] ^= mask[i];
    }
    const result = Buffer.alloc(text.length);
    right.copy(result, text.length - size);
    const middle = result[size - 1];
    left.copy(result);
    if (isOdd) result[size - 1] |= middle;
    return result;
  }
}

function ecb(create, key) {
  return create('aes-128-ecb', key, null).setAutoPadding(false);
}

/** HMAC-SHA256(key, CID)[:16]. */
export function resetToken(key, cid) {
  return createHmac('sha256', key).update(cid).digest().subarray(0, TOKEN_LENGTH);
}

/** How long a reset is that answers `trigger` octets; 0 if there may be none (RFC 9000, section 10.3.3). */
export function resetSize(trigger) {
  if (trigger <= 21) return 0;
  if (trigger <= 43) return trigger - 1;
  const largest = Math.min(trigger - 1, 100);
  return 42 + (randomBytes(2).readUInt16BE() % (largest - 42 + 1)); // below 42 it can be told from a data packet
}

/** A whole datagram of `size` octets that ends in `token` and looks like a short header packet. */
export function resetDatagram(token, size) {
  const random = randomBytes(size - TOKEN_LENGTH);
  random[0] = 0x40 | (random[0] & 0x3f);
  return Buffer.concat([random, token]);
}

/**
 * The name of a nonce space in nonce files. It has no config ID if there is a key: configurations that share key and
 * server ID share nonces (section 9.6).
 */
export function identity(config, serverId) {
  const space = Buffer.concat([Buffer.from([config.serverIdLength, config.nonceLength]), serverId]);
  const digest = config.key
    ? createHmac('sha256', config.key).update('quiclb nonces').update(space)
    : createHash('sha256').update('quiclb plaintext nonces').update(Buffer.from([config.configId])).update(space);
  return digest.digest().subarray(0, 16).toString('hex');
}

// Nonces.

/** Octets to number, and back. */
export const toNumber = (octets) => BigInt(`0x${octets.toString('hex') || '0'}`);
export const toOctets = (number, length) => Buffer.from(number.toString(16).padStart(2 * length, '0'), 'hex');

/** A counter from a random start; a permutation hides it if there is no key. */
class Counter {
  constructor(config, name, mark) {
    this.name = name;
    this.length = config.nonceLength;
    this.space = 1n << BigInt(8 * config.nonceLength);
    this.isSaved = mark !== undefined;
    if (mark) {
      const isGood = mark.start < this.space && mark.reserved <= this.space
        && mark.permutationKey.length === (config.key ? 0 : KEY_LENGTH);
      if (!isGood) throw new Refused([`nonce mark ${name}: not one for nonces of ${this.length} octets`]);
    }
    this.start = mark ? mark.start : toNumber(randomBytes(this.length));
    // What the process before us reserved and did not use is skipped: nobody knows how much that was.
    this.used = this.reserved = mark ? mark.reserved : 0n;
    this.permutationKey = mark ? mark.permutationKey : config.key ? NONE : randomBytes(KEY_LENGTH);
    this.permutation = this.permutationKey.length ? new FourPass(this.permutationKey) : null;
  }

  take() {
    const nonce = toOctets((this.start + this.used) & (this.space - 1n), this.length);
    this.used += 1n;
    return this.permutation ? this.permutation.encrypt(nonce) : nonce;
  }
}

/**
 * Nonce marks: one small file that says which nonces are spent, in the format of quiclb's own (lb/highwater.py). It
 * belongs to one process at a time, which holds `path`.lock.
 */
class Marks {
  constructor(path) {
    this.path = path;
    this.lock = attempt(`${path}.lock`, () =>
      openSync(`${path}.lock`, constants.O_RDWR | constants.O_CREAT | constants.O_NOFOLLOW, 0o600));
    // Node has no flock(2). It belongs to the open file, so it stays ours when the program that takes it has ended.
    const stdio = ['ignore', 'ignore', 'ignore', this.lock];
    const taken = spawnSync('flock', ['--exclusive', '--nonblock', '3'], { stdio });
    if (taken.error) throw new Refused([`${path}: the program flock (Debian: util-linux) is missing`]);
    if (taken.status !== 0) {
      closeSync(this.lock);
      throw new Refused([
        `${path}: in use by another process; every process needs a nonce file and server IDs of its own`,
      ]);
    }
    try {
      this.table = this.read();
    } catch (error) {
      closeSync(this.lock);
      throw error;
    }
  }

  read() {
    let file;
    try {
      file = openSync(this.path, constants.O_RDONLY | constants.O_NOFOLLOW | constants.O_NONBLOCK);
    } catch (error) {
      if (error.code === 'ENOENT') return new Map(); // a fresh start
      throw new Refused([`${this.path}: ${reasonOf(error)}`]);
    }
    try {
      const status = fstatSync(file);
      if (!status.isFile()) throw new Refused([`${this.path}: expected a regular file`]);
      if (status.mode & 0o077) {
        throw new Refused([`${this.path}: mode ${octal(status.mode)}, expected 0600; it holds secrets`]);
      }
      return parseMarks(readAll(file, MAX_MARKS_FILE));
    } catch (error) {
      if (error instanceof Refused) throw error;
      throw new Refused([
        `${this.path}: damaged, so that it no longer says which nonces are spent. Restore the newest copy of it, or `
        + 'give this server new server IDs (or new keys) and then delete it',
      ]);
    } finally {
      closeSync(file);
    }
  }

  /** Keeps a mark; durable when it returns. */
  save(name, mark) {
    const table = new Map(this.table).set(name, mark);
    const text = printTable(table, true);
    const content = `{\n "format": "${FORMAT}",\n "sha256": "${digestOf(table)}",\n "marks": ${text}\n}\n`;
    const temporary = `${this.path}.new`;
    const flags = constants.O_WRONLY | constants.O_CREAT | constants.O_TRUNC | constants.O_NOFOLLOW;
    const file = openSync(temporary, flags, 0o600);
    try {
      fchmodSync(file, 0o600); // whatever a leftover had
      for (let rest = Buffer.from(content); rest.length; rest = rest.subarray(writeSync(file, rest)));
      fsyncSync(file);
    } finally {
      closeSync(file);
    }
    renameSync(temporary, this.path);
    const directory = openSync(dirname(this.path), constants.O_RDONLY | constants.O_DIRECTORY);
    try {
      fsyncSync(directory);
    } finally {
      closeSync(directory);
    }
    this.table = table;
  }
}

function printTable(table, isIndented) {
  const space = isIndented ? ' ' : '';
  const entries = [...table].sort(([one], [other]) => (one < other ? -1 : 1)).map(([name, mark]) =>
    `"${name}":${space}{"permutation_key":${space}"${mark.permutationKey.toString('hex')}",${space}`
    + `"reserved":${space}${mark.reserved},${space}"start":${space}${mark.start}}`);
  return `{${isIndented ? '\n  ' : ''}${entries.join(isIndented ? ',\n  ' : ',')}}`;
}

function digestOf(table) {
  return createHash('sha256').update(printTable(table, false)).digest('hex');
}

/** Throws anything at all for a file that is not one of ours. Numbers go up to 2**144. */
function parseMarks(text) {
  const document = parseDocument(text.toString('utf8'), { intAsBigInt: true, uniqueKeys: true });
  if (document.errors.length) throw document.errors[0];
  const { format, sha256, marks } = document.toJS({ maxAliasCount: 0 });
  const table = new Map();
  for (const [name, mark] of Object.entries(marks)) {
    const { start, reserved } = mark;
    if (typeof start !== 'bigint' || typeof reserved !== 'bigint' || start < 0n || reserved < 0n) throw new Error();
    if (!/^([0-9a-f]{32})?$/.test(mark.permutation_key)) throw new Error();
    table.set(name, { start, reserved, permutationKey: Buffer.from(mark.permutation_key, 'hex') });
  }
  if (format !== FORMAT || sha256 !== digestOf(table)) throw new Error();
  return table;
}

// Files.

const reasonOf = (error) => String(error.message).replace(/^[A-Z0-9]+: /, '').replace(/, \w+ '.*$/, '');
const octal = (mode) => (mode & 0o7777).toString(8).padStart(4, '0');

function attempt(path, act) {
  try {
    return act();
  } catch (error) {
    throw new Refused([`${path}: ${reasonOf(error)}`]);
  }
}

function readAll(file, most) {
  const octets = Buffer.alloc(most + 1);
  let length = 0;
  for (let got = 1; got > 0 && length <= most; length += got) {
    got = readSync(file, octets, length, most + 1 - length, null);
  }
  if (length > most) throw new Refused(['too long']);
  return octets.subarray(0, length);
}

function readRegular(path, most, check) {
  const file = attempt(path, () => openSync(path, constants.O_RDONLY | constants.O_NONBLOCK)); // a pipe would wait
  try {
    const status = fstatSync(file);
    if (!status.isFile()) throw new Refused([`${path}: not a regular file`]);
    check(status);
    return attempt(path, () => readAll(file, most));
  } finally {
    closeSync(file);
  }
}

/** The text of a file that nobody but the operator may read. */
function readSecret(path, expected) {
  return readRegular(path, MAX_KEY_FILE, (status) => {
    if (status.mode & 0o007) {
      throw new Refused([`${path}: mode ${octal(status.mode)} lets everybody at it: expected 0600 or 0640`]);
    }
  }).toString('latin1').trim() || refuse(`${path}: holds nothing: expected ${expected}`);
}

function refuse(line) {
  throw new Refused([line]);
}

function readKey(path, length) {
  const expected = `${2 * length} hex digits (${length} octets)`;
  const digits = readSecret(path, expected);
  if (digits.length !== 2 * length) refuse(`${path}: holds ${digits.length} characters: expected ${expected}`);
  if (!/^[0-9a-f]*$/i.test(digits)) refuse(`${path}: holds something else than hex digits: expected ${expected}`);
  return Buffer.from(digits, 'hex');
}

/** The keys in a file of 1 to `most` lines of 64 hex digits, the newest first. Throws Refused. */
export function readKeys(path, most) {
  const expected = `1 to ${most} lines of 64 hex digits`;
  const lines = readSecret(path, expected).split(/\s*\n\s*/);
  if (lines.length > most || !lines.every((line) => /^[0-9a-f]{64}$/i.test(line))) {
    refuse(`${path}: holds something else: expected ${expected}`);
  }
  return lines.map((line) => Buffer.from(line, 'hex'));
}

const shown = (text) => {
  const safe = String(text).replace(/[0-9a-f]{32,}/gi, (run) => `<${run.length} hex digits>`).replace(/[^ -~]/g, '?');
  return safe.length > 60 ? `${safe.slice(0, 57)}...` : safe;
};

/** The values of one mapping, and what is wrong with them. */
class Section {
  constructor(map, prefix, keys, mistakes) {
    this.prefix = prefix;
    this.mistakes = mistakes;
    this.values = new Map();
    for (const pair of map.items) {
      const key = isScalar(pair.key) ? String(pair.key.source ?? pair.key.value) : null;
      if (key === null) mistakes.push(`${prefix || 'the file'}: a list, mapping or alias for a key: expected a word`);
      else if (!keys.includes(key)) mistakes.push(`${prefix}${shown(key)}: no such key`);
      else this.values.set(key, pair.value);
    }
  }

  has(key) {
    return this.values.has(key);
  }

  wrong(key, message) {
    this.mistakes.push(`${this.prefix}${key}: ${message}`);
  }

  /** A value as it was written, if it is one. */
  scalar(key, isRequired) {
    const node = this.values.get(key);
    if (!this.has(key)) {
      if (isRequired) this.wrong(key, 'missing');
      return null;
    }
    if (!isScalar(node)) {
      this.wrong(key, 'a list, mapping or alias: expected one value');
      return null;
    }
    return { text: node.source ?? String(node.value), isPlain: node.type === 'PLAIN', value: node.value };
  }

  integer(key, low, high, otherwise) {
    const found = this.scalar(key, otherwise === undefined);
    if (!found) return otherwise;
    if (found.isPlain && /^(0|[1-9][0-9]{0,8})$/.test(found.text) && +found.text >= low && +found.text <= high) {
      return +found.text;
    }
    this.wrong(key, `${shown(found.text)}: expected an integer, ${low} to ${high}`);
    return undefined;
  }

  flag(key, otherwise) {
    const found = this.scalar(key, false);
    if (!found) return otherwise;
    if (found.isPlain && /^(true|false)$/.test(found.text)) return found.text === 'true';
    this.wrong(key, `${shown(found.text)}: expected true or false`);
    return otherwise;
  }

  /** A text; what YAML takes for something else has to be in quotes. */
  text(key, pattern, expected, isRequired = false) {
    const found = this.scalar(key, isRequired);
    if (!found) return null;
    const isDate = found.isPlain && /^[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}/.test(found.text);
    if (typeof found.value !== 'string' || isDate) {
      this.wrong(key, `${shown(found.text)}: YAML takes this for something else; put it in quotes`);
    } else if (!pattern.test(found.text)) {
      this.wrong(key, `${shown(found.text)}: expected ${expected}`);
    } else {
      return found.text;
    }
    return null;
  }

  /** The name of a file; a relative one starts at the directory of the server's file. */
  file(key, of) {
    const text = this.text(key, /^[^\x00-\x1f\x7f]+$/, 'the name of a file');
    if (text === null) return null;
    if (/^([0-9a-f]{32}|[0-9a-f]{64})$/i.test(text)) {
      this.wrong(key, 'looks like a key: expected the name of the file that holds it');
      return null;
    }
    return resolve(dirname(of), text);
  }

  key(key, of, length) {
    const path = this.file(key, of);
    if (path === null) return null;
    try {
      return readKey(path, length);
    } catch (error) {
      this.mistakes.push(...error.lines);
      return null;
    }
  }
}

const TOP = ['name', 'cid-config', 'server-id', 'reset-key-file', 'nonce-file', 'made'];
const CID = ['config-id', 'server-id-length', 'nonce-length', 'key-file', 'encodes-length', 'appended-length'];

/** A server's file and the key files it names. Throws Refused with everything that is wrong with them. */
function readServerFile(path) {
  const text = readRegular(path, MAX_FILE, () => {}).toString('utf8');
  const documents = parseAllDocuments(text, { version: '1.1', uniqueKeys: true, keepSourceTokens: true });
  const document = documents[0];
  if (!document?.contents) refuse(`${path}: nothing in it: expected a mapping of keys to values`);
  if (documents.length > 1) refuse(`${path}: a second document after \`---\`: expected one`);
  if (document.errors.length) {
    const name = /^\s*"?([a-z-]+)/.exec(text.slice(document.errors[0].pos[0]))?.[1];
    refuse(document.errors[0].code === 'DUPLICATE_KEY'
      ? `${path}: ${name}: given twice: expected once`
      : `${path}: not YAML: ${shown(document.errors[0].message.split('\n')[0])}`);
  }
  if (!isMap(document.contents)) refuse(`${path}: expected a mapping of keys to values`);
  const mistakes = [];
  visit(document, {
    Alias: () => { mistakes.push(`${path}: aliases are not used here; write the value out`); },
    Value: (_, node) => { if (node.tag) mistakes.push(`${path}: tags are not used here; write the value alone`); },
  });
  const top = new Section(document.contents, '', TOP, mistakes);
  const aName = 'up to 64 letters, digits, dots, hyphens and underscores';
  const result = {
    name: top.text('name', /^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$/, aName, true),
    made: top.text('made', /^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$/, 'a moment as "2026-11-21T09:42:25Z"') ?? '',
    config: null,
    serverId: null,
    resetKey: top.key('reset-key-file', path, RESET_KEY_LENGTH),
    nonceFile: top.file('nonce-file', path),
  };
  if (top.has('cid-config')) {
    const node = top.values.get('cid-config');
    if (isMap(node)) result.config = readCidConfig(new Section(node, 'cid-config.', CID, mistakes), path);
    else top.wrong('cid-config', 'expected a mapping');
    if (!top.has('server-id')) top.wrong('server-id', 'missing: expected one, since there is a cid-config');
  } else if (top.has('server-id')) {
    top.wrong('server-id', 'a server ID without a cid-config: expected both or neither');
  }
  const digits = top.text('server-id', /^([0-9a-f]{2}){1,15}$/i, '1 to 15 octets, two hex digits each, in quotes');
  if (digits !== null) {
    result.serverId = Buffer.from(digits, 'hex');
    const length = result.config?.serverIdLength;
    if (length && result.serverId.length !== length) {
      top.wrong('server-id', `${result.serverId.length} octets, but cid-config.server-id-length is ${length}`);
    }
  }
  if (mistakes.length) throw new Refused(mistakes);
  return result;
}

function readCidConfig(section, path) {
  const config = {
    configId: section.integer('config-id', 0, 6),
    serverIdLength: section.integer('server-id-length', 1, 15),
    nonceLength: section.integer('nonce-length', 4, 18),
    appendedLength: section.integer('appended-length', 0, 14, 0),
    encodesLength: section.flag('encodes-length', true),
    key: section.key('key-file', path, KEY_LENGTH),
  };
  const block = config.serverIdLength + config.nonceLength;
  const length = block + 1 + config.appendedLength;
  const wrong = (message) => section.mistakes.push(`cid-config: ${message}`);
  if (block > 19) wrong(`server ID and nonce take ${block} octets together: expected at most 19`);
  else if (length > MAX_CID) wrong(`${config.appendedLength} appended octets: a CID holds at most 20 octets in all`);
  else if (length < MIN_CID) wrong(`connection IDs of ${length} octets: expected at least ${MIN_CID}`);
  return config;
}

// The server.

/** One server: its configuration, its nonces, and the configurations it had before. */
export class Server {
  /** Reads a server's file and the key files it names. Throws Refused. */
  constructor(path) {
    const file = readServerFile(path);
    this.path = path;
    /** Octets of all connection IDs of this server, as long as it runs. */
    this.cidLength = file.config ? cidLength(file.config) : MIN_CID;
    this.nonceFile = file.nonceFile;
    this.marks = file.nonceFile ? new Marks(file.nonceFile) : null;
    this.counters = new Map();
    this.knownAs = new Map();
    this.processKey = randomBytes(RESET_KEY_LENGTH); // of tokens that nobody else has to know
    this.attempts = 0;
    this.storeError = null;
    this.take(file);
  }

  /**
   * Reads the file again; connection IDs are made as it says from then on. Says whether they are others than before.
   * Throws Refused, and then nothing has changed.
   */
  reload() {
    const file = readServerFile(this.path);
    const mistakes = this.reasonsAgainst(file);
    if (mistakes.length) throw new Refused(mistakes);
    const before = this.current;
    this.take(file);
    const now = this.current;
    return !before || !now || before.counter !== now.counter
      || before.codec.config.configId !== now.codec.config.configId
      || !(before.resetKey ?? NONE).equals(now.resetKey ?? NONE);
  }

  /** What speaks against a file that is good as such: it is stale, or cut off, or takes a restart. */
  reasonsAgainst({ made, config, serverId, resetKey, nonceFile }) {
    const reasons = [];
    const counter = config ? this.counters.get(identity(config, serverId)) : undefined;
    const length = config ? cidLength(config) : this.cidLength;
    if (made && made < this.made) {
      reasons.push(`made: ${made}: older than the file in use, which is of ${this.made}`);
    } else if (!made && counter && counter !== this.current?.counter) {
      // Section 3.1: no connection ID is made under an old configuration.
      reasons.push('cid-config: this process has left this key and server ID for another already: expected a new key, '
        + 'or a file that says when it was made');
    }
    if (nonceFile !== this.nonceFile) {
      reasons.push(`nonce-file: ${nonceFile}: this process has ${this.nonceFile}; a restart changes it`);
    }
    if (this.current && !config) {
      reasons.push('cid-config: missing: the file in use has one; a restart changes it');
    }
    if (this.current?.resetKey && !resetKey) {
      reasons.push('reset-key-file: missing: the file in use has one; a restart changes it');
    }
    if (length !== this.cidLength) {
      const some = `this process has some of ${this.cidLength}; a restart changes it`;
      reasons.push(`cid-config: connection IDs of ${length} octets: ${some}`);
    }
    return reasons;
  }

  take({ name, made, config, serverId, resetKey }) {
    let current = null;
    if (config) {
      const space = identity(config, serverId);
      if (!this.counters.has(space)) {
        const counter = new Counter(config, space, this.marks?.table.get(space));
        if (!this.marks) counter.reserved = counter.space;
        this.counters.set(space, counter);
      }
      current = { codec: new Codec(config), serverId, resetKey, counter: this.counters.get(space) };
      this.knownAs.set(config.configId, current);
    }
    this.current = current;
    this.name = name;
    this.made = made;
  }

  /** This server's ID, null if there is no configuration. */
  get serverId() {
    return this.current?.serverId ?? null;
  }

  /**
   * A connection ID that was never issued before, of `cidLength` octets. Without a configuration, and when there is no
   * nonce that is certainly fresh, one that balancers route by address (0b111).
   */
  newCid() {
    const spare = randomBytes(1 + MAX_CID);
    if (!this.hasNonce()) {
      const cid = spare.subarray(0, this.cidLength);
      cid[0] = (UNROUTABLE << 5) | (this.cidLength - 1);
      return cid;
    }
    const { codec, serverId, counter } = this.current;
    const appended = spare.subarray(1, 1 + codec.config.appendedLength);
    return codec.encode(serverId, counter.take(), spare[0], appended);
  }

  /** The stateless reset token of one of this server's connection IDs. */
  tokenOf(cid) {
    return resetToken(this.knownAs.get(cid[0] >> 5)?.resetKey ?? this.processKey, cid);
  }

  /** Whether `cid` carries this server's ID. */
  isOwn(cid) {
    const knownAs = cid.length ? this.knownAs.get(cid[0] >> 5) : undefined;
    return knownAs?.codec.decode(cid)?.serverId.equals(knownAs.serverId) ?? false;
  }

  /** Whether an unknown connection ID may get a Stateless Reset: it is ours, and a client may know its token. */
  mayReset(cid) {
    return this.isOwn(cid) && this.knownAs.get(cid[0] >> 5).resetKey !== null;
  }

  hasNonce() {
    const counter = this.current?.counter;
    if (!counter || counter.used >= counter.space) return false;
    if (counter.used < counter.reserved) return true;
    if (this.storeError && ++this.attempts % RETRY_EVERY !== 0) return false; // a full disk must not cost a write each
    const { start, permutationKey } = counter;
    const reserved = counter.used + BLOCK < counter.space ? counter.used + BLOCK : counter.space;
    try {
      this.marks.save(counter.name, { start, reserved, permutationKey });
    } catch (error) {
      this.storeError = error;
      return false;
    }
    this.storeError = null;
    counter.reserved = reserved;
    return true;
  }
}
