/**
 * As much of HTTP/3 (RFC 9114) and QPACK (RFC 9204) as a small server needs: requests are read, responses are written
 * with literals. There is no dynamic table and no push; nothing here has state but for the octets of an incomplete
 * frame.
 */

export const H3_NO_ERROR = 0x100;
export const H3_INTERNAL_ERROR = 0x102;
const H3_FRAME_UNEXPECTED = 0x105;
const H3_EXCESSIVE_LOAD = 0x107;
const QPACK_DECOMPRESSION_FAILED = 0x200;
const DATA = 0;
const HEADERS = 1;
const SETTINGS = 4;
const GOAWAY = 7;
const FORBIDDEN = new Set([2, 3, SETTINGS, 5, 6, GOAWAY, 8, 9, 0xd]); // on a request stream, or anywhere
const CONTROL_STREAM = 0;
const MAX_TABLE_CAPACITY = 1;
const MAX_FIELD_SECTION_SIZE = 6;
const BLOCKED_STREAMS = 7;
const MAX_FIELDS = 16384; // octets of a request's field section

// Names and values of the static table (RFC 9204, appendix A) that say what is asked for; the others are skipped.
const STATIC_SIZE = 99;
const STATIC = new Map([
  [1, [':path', '/']], [15, [':method', 'CONNECT']], [16, [':method', 'DELETE']], [17, [':method', 'GET']],
  [18, [':method', 'HEAD']], [19, [':method', 'OPTIONS']], [20, [':method', 'POST']], [21, [':method', 'PUT']],
]);
const STATIC_STATUS = 24; // an entry whose name is `:status`
const STATIC_CONTENT_TYPE = 44;

/** What ends a connection; `code` is HTTP/3's or QPACK's. */
export class Http3Error extends Error {
  constructor(code, message) {
    super(message);
    this.code = code;
  }
}

const broken = () => new Http3Error(QPACK_DECOMPRESSION_FAILED, 'a field section that cannot be decoded');

// Integers of 1 to 8 octets (RFC 9000, section 16).

export function encodeInteger(number) {
  if (number < 2 ** 6) return Buffer.from([number]);
  if (number < 2 ** 14) return Buffer.from([0x40 | (number >> 8), number & 0xff]);
  const octets = Buffer.alloc(number < 2 ** 30 ? 4 : 8);
  if (octets.length === 4) octets.writeUInt32BE((number | 0x80000000) >>> 0);
  else octets.writeBigUInt64BE(BigInt(number) | 0xc000000000000000n);
  return octets;
}

/** The integer at an offset and where it ends; null if it is incomplete. */
export function decodeInteger(octets, at) {
  if (at >= octets.length) return null;
  const length = 1 << (octets[at] >> 6);
  if (at + length > octets.length) return null;
  let number = octets[at] & 0x3f;
  for (let i = 1; i < length; i++) number = number * 256 + octets[at + i];
  return [number, at + length];
}

// QPACK.

// Lengths of the codes of the 256 octets and of the end (RFC 7541, appendix B), one digit of base 36 each. The codes
// are canonical: those of one length count up in the order of what they stand for, and go on from the shorter ones.
const LENGTHS =
  'dnsssssssoussussssssssusssssssss6aacd68baa8b8666555666666678f6cad677777777777777777777'
  + '77878djde6f56565666577666567655677777fbedskmkkmmmnmnnnnnonoomnonnnnlmnmnnomlkmmnnlnmmo'
  + 'lmnnllmlnmnnkmmmnmmnqqkjmnmpqqqrrqopjlqrrqrollqqsrrrkoklmllnmmppooqnqrqqrrrrrsrrrrrqu';
const SYMBOLS = new Map(); // by length and code
for (let length = 1, code = 0; length <= 30; length++, code *= 2) {
  for (let symbol = 0; symbol < LENGTHS.length; symbol++) {
    if (parseInt(LENGTHS[symbol], 36) === length) SYMBOLS.set(length * 2 ** 30 + code++, symbol);
  }
}

export function decodeHuffman(octets) {
  const text = [];
  let code = 0;
  let length = 0;
  for (const octet of octets) {
    for (let bit = 7; bit >= 0; bit--) {
      code = code * 2 + ((octet >> bit) & 1);
      length++;
      const symbol = SYMBOLS.get(length * 2 ** 30 + code);
      if (symbol === 256 || length > 30) throw broken();
      if (symbol !== undefined) {
        text.push(symbol);
        code = 0;
        length = 0;
      }
    }
  }
  if (length > 7 || code !== 2 ** length - 1) throw broken(); // the padding is the beginning of the end's code
  return Buffer.from(text);
}

/** An integer with a prefix of some bits (RFC 7541, section 5.1), and where it ends. */
function prefixed(octets, at, bits) {
  const most = (1 << bits) - 1;
  if (at >= octets.length) throw broken();
  let number = octets[at++] & most;
  if (number < most) return [number, at];
  for (let shift = 0; ; shift += 7) {
    if (at >= octets.length || shift > 28) throw broken();
    const octet = octets[at++];
    number += (octet & 0x7f) * 2 ** shift;
    if (octet < 0x80) return [number, at];
  }
}

/** A string whose length has a prefix of some bits, with the bit that says Huffman before them. */
function string(octets, at, bits) {
  const isHuffman = at < octets.length && (octets[at] & (1 << bits)) !== 0;
  const [length, begin] = prefixed(octets, at, bits);
  if (begin + length > octets.length) throw broken();
  const content = octets.subarray(begin, begin + length);
  return [(isHuffman ? decodeHuffman(content) : content).toString('latin1'), begin + length];
}

/** `method` and `path` of a request's field section. */
export function decodeFields(octets) {
  const fields = {};
  const [required, base] = prefixed(octets, 0, 8);
  let [, at] = prefixed(octets, base, 7);
  if (required !== 0) throw broken(); // of a dynamic table, which we have not offered
  while (at < octets.length) {
    const first = octets[at];
    let index = 0;
    let name;
    let value;
    if ((first & 0xc0) === 0xc0) {
      [index, at] = prefixed(octets, at, 6);
      [name, value] = STATIC.get(index) ?? [];
    } else if ((first & 0xd0) === 0x50) {
      [index, at] = prefixed(octets, at, 4);
      [name] = STATIC.get(index) ?? [];
      [value, at] = string(octets, at, 7);
    } else if ((first & 0xe0) === 0x20) {
      [name, at] = string(octets, at, 3);
      [value, at] = string(octets, at, 7);
    } else {
      throw broken(); // the dynamic table's
    }
    if (index >= STATIC_SIZE) throw broken();
    if (name === ':method') fields.method = value;
    if (name === ':path') fields.path = value;
  }
  return fields;
}

/** A field whose name is one of the static table's beyond the prefix; the value has less than 127 characters. */
function field(nameIndex, value) {
  return Buffer.concat([Buffer.from([0x5f, nameIndex - 15, value.length]), Buffer.from(value)]);
}

// Frames.

function frame(type, payload) {
  return Buffer.concat([encodeInteger(type), encodeInteger(payload.length), payload]);
}

/** A HEADERS frame: the status and the type of what follows. */
export function responseHeaders(status, contentType) {
  const fields = [field(STATIC_STATUS, String(status)), field(STATIC_CONTENT_TYPE, contentType)];
  return frame(HEADERS, Buffer.concat([Buffer.from([0, 0]), ...fields]));
}

/** The beginning of a DATA frame of that many octets. */
export function dataHeader(length) {
  return Buffer.concat([encodeInteger(DATA), encodeInteger(length)]);
}

/** What a server's control stream begins with. */
export function controlStream() {
  const settings = [MAX_TABLE_CAPACITY, 0, MAX_FIELD_SECTION_SIZE, MAX_FIELDS, BLOCKED_STREAMS, 0];
  return Buffer.concat([encodeInteger(CONTROL_STREAM), frame(SETTINGS, Buffer.concat(settings.map(encodeInteger)))]);
}

export function goaway(streamId) {
  return frame(GOAWAY, encodeInteger(streamId));
}

/** Reads the octets of one request stream. `onFields(fields)` comes first, then `onBody(octets)` for each piece. */
export class RequestReader {
  constructor(onFields, onBody) {
    this.onFields = onFields;
    this.onBody = onBody;
    this.rest = Buffer.alloc(0);
    this.bodyLeft = 0; // octets of the DATA frame that is being read
    this.skipLeft = 0; // octets of a frame that is nothing to us
    this.hasFields = false;
  }

  /** Throws Http3Error. */
  read(octets) {
    let data = this.rest.length ? Buffer.concat([this.rest, octets]) : octets;
    while (data.length) {
      if (this.bodyLeft || this.skipLeft) {
        const piece = data.subarray(0, this.bodyLeft || this.skipLeft);
        data = data.subarray(piece.length);
        if (this.bodyLeft) {
          this.bodyLeft -= piece.length;
          this.onBody(piece);
        } else {
          this.skipLeft -= piece.length;
        }
        continue;
      }
      const type = decodeInteger(data, 0);
      const length = type && decodeInteger(data, type[1]);
      if (!length) break;
      const [size, begin] = length;
      if (FORBIDDEN.has(type[0]) || (type[0] === DATA && !this.hasFields)) {
        throw new Http3Error(H3_FRAME_UNEXPECTED, `frame ${type[0]} on a request stream`);
      }
      if (type[0] === HEADERS && !this.hasFields) {
        if (size > MAX_FIELDS) throw new Http3Error(H3_EXCESSIVE_LOAD, 'a field section that is too long');
        if (data.length < begin + size) break;
        this.hasFields = true;
        this.onFields(decodeFields(data.subarray(begin, begin + size)));
        data = data.subarray(begin + size);
      } else {
        if (type[0] === DATA) this.bodyLeft = size;
        else this.skipLeft = size; // trailers too
        data = data.subarray(begin);
      }
    }
    this.rest = Buffer.from(data); // a frame's beginning, or fields that are incomplete
  }
}
