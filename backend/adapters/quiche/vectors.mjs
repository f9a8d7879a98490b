/**
 * Reads vectors (tests/data/adapter-vectors.json) on standard input and writes them on standard output with everything
 * computed anew that quiclb.mjs can compute. A test compares.
 */
import { readFileSync } from 'node:fs';
import { Codec, FourPass, identity, resetToken } from './quiclb.mjs';

const hex = (octets) => octets.toString('hex');
const octets = (digits) => (digits === null ? null : Buffer.from(digits, 'hex'));

function configOf(vector) {
  return {
    configId: vector.config_id,
    serverIdLength: vector.server_id.length / 2,
    nonceLength: vector.nonce_length ?? vector.nonce.length / 2,
    appendedLength: (vector.appended ?? '').length / 2,
    encodesLength: vector.encodes_length,
    key: octets(vector.key),
  };
}

const COMPUTE = {
  cids: (vector) => {
    const codec = new Codec(configOf(vector));
    // What is decoded is what the file has, not what was just made.
    const decoded = codec.decode(octets(vector.cid));
    const appended = octets(vector.appended);
    const cid = codec.encode(octets(vector.server_id), octets(vector.nonce), vector.low_bits, appended);
    return { server_id: hex(decoded.serverId), nonce: hex(decoded.nonce), cid: hex(cid) };
  },
  tokens: (vector) => ({ token: hex(resetToken(octets(vector.key), octets(vector.cid))) }),
  identities: (vector) => ({ identity: identity(configOf(vector), octets(vector.server_id)) }),
  permutations: (vector) => ({ nonce: hex(new FourPass(octets(vector.key)).encrypt(octets(vector.counter))) }),
};

const given = JSON.parse(readFileSync(0, 'utf8'));
const computed = Object.entries(COMPUTE).map(([section, compute]) => [
  section,
  given[section].map((vector) => ({ ...vector, ...compute(vector) })),
]);
process.stdout.write(`${JSON.stringify(Object.fromEntries(computed))}\n`);
