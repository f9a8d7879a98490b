/**
 * What is sent to clients for which there is no connection (yet): tokens of Retry packets, which any server of the
 * fleet can verify, and refusals. Nothing is kept of either.
 */
import { createCipheriv, createDecipheriv, createHmac, hkdfSync, randomBytes } from 'node:crypto';
import { encodeInteger } from './h3.mjs';

const LIFETIME = 30_000; // milliseconds; a client returns a token at once
const MAX_SKEW = 5_000; // that another server's clock may be ahead of ours
const NONCE = 12;
const TAG = 16;
const INITIAL_SALT = Buffer.from('38762cf7f55934b34d179ae6a4c80cadccbb7f0a', 'hex'); // RFC 9001, section 5.2

/** A key for one purpose, of those that the operator has given for all. */
export function derive(key, purpose, length = 32) {
  return Buffer.from(hkdfSync('sha256', key, Buffer.alloc(0), `quiclb quiche ${purpose}`, length));
}

/** Tokens under the first of some keys; those under the others are good too. */
export class RetryTokens {
  constructor(keys) {
    this.keys = keys.map((key) => derive(key, 'retry tokens'));
  }

  /** A token for a client's address that says what its first DCID was; `retryScid` is our Retry's SCID. */
  create(version, address, original, retryScid, now = Date.now()) {
    const nonce = randomBytes(NONCE);
    const cipher = createCipheriv('aes-256-gcm', this.keys[0], nonce);
    cipher.setAAD(boundTo(version, address, retryScid));
    const time = Buffer.alloc(8);
    time.writeBigUInt64BE(BigInt(now));
    return Buffer.concat([nonce, cipher.update(Buffer.concat([time, original])), cipher.final(), cipher.getAuthTag()]);
  }

  /** The DCID of the client's first Initial; null for a token that is forged, expired, or somebody else's. */
  original(version, address, dcid, token, now = Date.now()) {
    if (token.length < NONCE + 8 + TAG || token.length > NONCE + 8 + 20 + TAG) return null;
    for (const key of this.keys) {
      const decipher = createDecipheriv('aes-256-gcm', key, token.subarray(0, NONCE));
      decipher.setAAD(boundTo(version, address, dcid));
      decipher.setAuthTag(token.subarray(-TAG));
      try {
        const text = Buffer.concat([decipher.update(token.subarray(NONCE, -TAG)), decipher.final()]);
        const age = now - Number(text.readBigUInt64BE());
        return age >= -MAX_SKEW && age <= LIFETIME ? text.subarray(8) : null;
      } catch {
        // Another key's, or nobody's.
      }
    }
    return null;
  }
}

function boundTo(version, address, retryScid) {
  return Buffer.from(`${version} ${address.address} ${address.port} ${retryScid.toString('hex')}`);
}

/**
 * An Initial packet of version 1 with a CONNECTION_CLOSE frame, for a client whose Initial had this DCID and SCID
 * (RFC 9001, section 5): it needs no TLS and no state.
 */
export function refusal(dcid, scid, errorCode) {
  const initial = createHmac('sha256', INITIAL_SALT).update(dcid).digest();
  const secret = expand(initial, 'server in', 32);
  const close = Buffer.concat([Buffer.from([0x1c]), encodeInteger(errorCode), Buffer.from([0, 0])]);
  const payload = Buffer.concat([close, Buffer.alloc(16)]); // padding, so that there is enough to sample
  const header = Buffer.concat([
    Buffer.from([0xc0, 0, 0, 0, 1, scid.length]), scid, Buffer.from([dcid.length]), dcid,
    Buffer.from([0]), // no token
    encodeInteger(1 + payload.length + TAG),
    Buffer.from([0]), // packet number
  ]);
  const cipher = createCipheriv('aes-128-gcm', expand(secret, 'quic key', 16), expand(secret, 'quic iv', 12));
  cipher.setAAD(header);
  const sealed = Buffer.concat([cipher.update(payload), cipher.final(), cipher.getAuthTag()]);
  const mask = createCipheriv('aes-128-ecb', expand(secret, 'quic hp', 16), null).update(sealed.subarray(3, 19));
  header[0] ^= mask[0] & 0x0f;
  header[header.length - 1] ^= mask[1];
  return Buffer.concat([header, sealed]);
}

/** HKDF-Expand-Label of TLS 1.3, up to 32 octets. */
function expand(secret, label, length) {
  const full = `tls13 ${label}`;
  const info = Buffer.concat([Buffer.from([0, length, full.length]), Buffer.from(full), Buffer.from([0, 1])]);
  return createHmac('sha256', secret).update(info).digest().subarray(0, length);
}
