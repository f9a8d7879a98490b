/**
 * A small HTTP/3 server on quiche, by the native part of npm's `@matrixai/quic`, that a QUIC-LB balancer can route to.
 *
 * What another server has to do as this one does is in docs/servers/quiche.md; the places are marked "routable:".
 */
import { createHash, randomBytes } from 'node:crypto';
import { createSocket } from 'node:dgram';
import { createRequire } from 'node:module';
import { isIP } from 'node:net';
import { parseArgs } from 'node:util';
import {
  controlStream, dataHeader, goaway, H3_INTERNAL_ERROR, H3_NO_ERROR, Http3Error, RequestReader, responseHeaders,
} from './h3.mjs';
import { readKeys, Refused, resetDatagram, resetSize, Server, toNumber } from './quiclb.mjs';
import { derive, refusal, RetryTokens } from './tokens.mjs';

const quiche = createRequire(import.meta.url)('@matrixai/quic-linux-x64');

const MAX_CONNECTIONS = 10_000;
const MAX_STREAMS = 63; // of one connection at a time
const MAX_TOKEN_KEYS = 8;
const MAX_CIDS = 8; // of one connection at a time
const RESETS_PER_SECOND = 200; // behind a balancer every client has one address, so none per source
const PACKET = 1350; // octets; what quiche sends at most
const SETTLED = 100; // milliseconds, and four round trips: what was sent before has arrived
const TICK = 50; // milliseconds between the lines of /slow
const MAX_SECONDS = 3600; // of one /slow
const MAX_BYTES = 2 ** 34; // of one /bytes
const CHUNK = Buffer.from(Array.from({ length: 65536 + 256 }, (_, i) => i & 0xff));
const CONTROL = 3; // the first stream that a server opens of its own
const INVALID_TOKEN = 0x0b;
const CONNECTION_REFUSED = 0x02;
const USAGE = `usage: server --listen ADDRESS:PORT [--listen ...] --server-config FILE --cert PEM --key PEM
              [--name NAME] [--retry] [--token-key-file FILE] [--idle-timeout SECONDS]`;

const say = (line) => process.stderr.write(`quiche: ${line}\n`);
const keyOf = (cid) => Buffer.from(cid).toString('latin1');
const shown = ({ address, port }) => (isIP(address) === 6 ? `[${address}]:${port}` : `${address}:${port}`);

/** A body: `next(room)` is the next piece of at most that many octets; an empty one means not yet, null the end. */
const BODY = {
  of: (content) => {
    let rest = content;
    return (room) => {
      const piece = rest.subarray(0, room);
      rest = rest.subarray(piece.length);
      return piece.length ? piece : null;
    };
  },
  countingUp: (length) => {
    let sent = 0;
    return (room) => {
      const begin = sent % 256;
      const piece = CHUNK.subarray(begin, begin + Math.min(room, length - sent, 65536));
      sent += piece.length;
      return piece.length ? piece : null;
    };
  },
  ofLines: (ticks, begun) => {
    let sent = 0;
    let ticked = 0;
    return () => {
      const due = Math.floor((performance.now() - begun) / TICK) + 1;
      if (ticked > ticks) return null;
      const upTo = Math.min(due, ticks);
      let text = '';
      for (; sent < upTo; sent++) text += `${sent}\n`;
      ticked = due;
      if (due > ticks) text += 'end\n';
      return Buffer.from(text);
    };
  },
};

/** The response to a request: status, type and body; `ticks` if the body grows by itself. */
function answer(site, request) {
  const text = (status, line) => ({ status, type: 'text/plain', body: BODY.of(Buffer.from(`${line}\n`)) });
  const json = (value) => ({ ...text(200, JSON.stringify(value)), type: 'application/json' });
  const { method, path = '' } = request.fields;
  const number = (prefix, most) => {
    const digits = path.startsWith(prefix) ? path.slice(prefix.length) : '';
    return /^[0-9]+(\.[0-9]+)?$/.test(digits) && +digits <= most ? +digits : null;
  };
  if (path === '/upload' && (method === 'PUT' || method === 'POST')) {
    if (request.isEarly) return text(425, 'early data may be replayed');
    return json({ octets: request.octets, sha256: request.digest.digest('hex') });
  }
  if (method !== 'GET') return text(405, 'expected GET');
  if (path === '/') return text(200, 'This is quiche, behind quiclb.');
  if (path === '/whoami') {
    return json({
      name: site.name ?? site.server.name,
      server_id: site.server.serverId?.toString('hex') ?? null,
      cids: request.connection.cids().map((cid) => cid.toString('hex')),
      connection: request.connection.original.toString('hex'),
      client: shown(request.connection.peer()),
    });
  }
  const octets = number('/bytes/', MAX_BYTES);
  if (octets !== null) {
    return { status: 200, type: 'application/octet-stream', body: BODY.countingUp(Math.floor(octets)) };
  }
  const seconds = number('/slow/', MAX_SECONDS);
  if (seconds !== null) {
    const ticks = Math.round((seconds * 1000) / TICK);
    return { status: 200, type: 'text/plain', body: BODY.ofLines(ticks, performance.now()), isSlow: true };
  }
  const status = number('/status/', 599);
  if (status !== null && status >= 200) return text(Math.floor(status), 'as you wish');
  return text(404, 'no such resource');
}

/** One request stream: what has come of the request, and what is left of the response. */
class Request {
  constructor(connection, id) {
    this.connection = connection;
    this.id = id;
    this.fields = null;
    this.octets = 0;
    this.digest = createHash('sha256');
    this.isEarly = connection.quic.isInEarlyData();
    this.reader = new RequestReader(
      (fields) => { this.fields = fields; },
      (octets) => {
        this.octets += octets.length;
        this.digest.update(octets);
      },
    );
    this.pending = []; // octets that quiche has had no room for
    this.body = null;
    this.isSlow = false;
    this.isOver = false;
  }

  respond(site) {
    const response = answer(site, this);
    this.pending = [responseHeaders(response.status, response.type)];
    this.body = response.body;
    this.isSlow = response.isSlow ?? false;
  }

  /** Gives quiche what it has room for. */
  write() {
    const { quic } = this.connection;
    try {
      while (!this.isOver) {
        if (!this.pending.length) {
          const room = quic.streamCapacity(this.id);
          if (room <= 16) return;
          const piece = this.body(room - 16);
          if (piece === null) {
            quic.streamSend(this.id, Buffer.alloc(0), true);
            this.isOver = true;
            return;
          }
          if (!piece.length) return;
          this.pending = [dataHeader(piece.length), piece];
        }
        const sent = quic.streamSend(this.id, this.pending[0], false) ?? 0;
        if (sent < this.pending[0].length) {
          this.pending[0] = this.pending[0].subarray(sent);
          return;
        }
        this.pending.shift();
      }
    } catch {
      this.isOver = true; // the client does not want it any more
    }
  }
}

/** One connection: quiche's, its connection IDs, its requests and its timer. */
class Connection {
  constructor(site, quic, original, socket, address) {
    this.site = site;
    this.quic = quic;
    this.original = original;
    this.socket = socket;
    this.address = address; // of the client when it came
    this.routes = new Map(); // our connection IDs, by their key
    this.requests = new Map();
    this.timer = null;
    this.ticker = null;
    this.isSetUp = false;
    this.renewing = 0; // connection IDs of an earlier configuration that are still to be replaced
    this.issued = 0; // when the last connection ID was, in milliseconds
    this.settler = null;
    this.isStale = false; // all that the client has are to be replaced, once it has retired what it was asked to
  }

  cids() {
    return [...this.routes.values()];
  }

  peer() {
    const active = this.quic.pathStats().find((path) => path.active);
    return active ? { address: active.peerHost.host, port: active.peerHost.port } : this.address;
  }

  route(cid) {
    this.routes.set(keyOf(cid), Buffer.from(cid));
    this.site.connections.set(keyOf(cid), this);
  }

  receive(data, socket, address) {
    try {
      this.quic.recv(data, { to: hostOf(socket.bound), from: hostOf(address) });
    } catch {
      // quiche closes the connection itself, or the packet was none of this connection's.
    }
    this.go();
  }

  /** Does what can be done after anything has happened. */
  go() {
    const { quic } = this;
    try {
      if (!quic.isClosed() && !quic.isDraining() && (quic.isEstablished() || quic.isInEarlyData())) this.serve();
    } catch (error) {
      if (!(error instanceof Http3Error)) this.site.complain(error); // a bug costs its connection
      closeQuietly(quic, true, error.code ?? H3_INTERNAL_ERROR);
    }
    this.flush();
    if (quic.isClosed()) {
      this.end();
      return;
    }
    clearTimeout(this.timer);
    const timeout = quic.timeout();
    this.timer = timeout === null ? null : setTimeout(() => this.expire(), timeout);
  }

  serve() {
    const { quic } = this;
    if (!this.isSetUp) {
      this.isSetUp = true;
      quic.streamSend(CONTROL, controlStream(), false);
    }
    this.replenish();
    for (const id of quic.readable()) this.read(id);
    for (const id of quic.writable()) this.requests.get(id)?.body && this.requests.get(id).write();
    this.tick();
  }

  /** routable: every connection ID after the first, and its stateless reset token. */
  replenish() {
    const { quic, site } = this;
    for (let cid = quic.retiredScidNext(); cid !== null; cid = quic.retiredScidNext()) {
      site.forget(cid, this);
      this.routes.delete(keyOf(cid));
    }
    if (!quic.isEstablished()) return;
    while (quic.sourceCidsLeft() > 0 && this.issue(false));
    const most = quic.activeSourceCids() + quic.sourceCidsLeft(); // what is left is less than nothing at times
    if (this.isStale && this.renewing === 0 && quic.activeSourceCids() <= most) this.beginRenewal();
    // quiche 0.18 holds 2 * most - 1. To ask for more fails, but raises Retire Prior To all the same, above the
    // sequence numbers that clients get: they close the connection.
    for (; this.renewing > 0 && quic.activeSourceCids() < 2 * most - 1; this.renewing--) this.issue(true);
  }

  /**
   * Not before the client has what was issued last: quiche writes today's Retire Prior To into frames that it sends for
   * the first time, or again, whatever their sequence number is. Whether they are acknowledged it does not say.
   */
  beginRenewal() {
    const rtt = this.quic.pathStats().find((path) => path.active)?.rtt ?? SETTLED;
    const wait = this.issued + SETTLED + 4 * rtt - performance.now();
    if (wait > 0) {
      this.settler ??= setTimeout(() => {
        this.settler = null;
        this.go();
      }, wait);
      return;
    }
    this.isStale = false;
    this.renewing = this.quic.activeSourceCids();
  }

  /** Gives the client one more, if need be in place of the oldest that it has. False if quiche does not take it. */
  issue(inPlaceOfTheOldest) {
    const cid = this.site.server.newCid();
    try {
      this.quic.newSourceCid(cid, toNumber(this.site.server.tokenOf(cid)), inPlaceOfTheOldest);
    } catch {
      return false;
    }
    this.route(cid);
    this.issued = performance.now();
    return true;
  }

  /** routable: on a new configuration the client gets new connection IDs and retires all that it has. */
  renew() {
    this.isStale = true;
    this.go();
  }

  read(id) {
    const { quic } = this;
    const isRequest = id % 4 === 0;
    const octets = Buffer.alloc(65536);
    if (isRequest && !this.requests.has(id)) this.requests.set(id, new Request(this, id));
    const request = this.requests.get(id);
    for (;;) {
      let got;
      try {
        got = quic.streamRecv(id, octets);
      } catch {
        if (request) request.isOver = true; // the client has reset it
        return;
      }
      if (got === null) return;
      const [length, isLast] = got;
      if (!isRequest) continue; // control and QPACK streams: we have no table, and nothing to be told
      request.reader.read(octets.subarray(0, length));
      if (isLast) {
        if (request.fields === null) request.isOver = true;
        else {
          request.respond(this.site);
          request.write();
        }
        return;
      }
    }
  }

  /** Lets lines of /slow go that are due, and forgets requests that are over. */
  tick() {
    let isSlow = false;
    for (const [id, request] of this.requests) {
      if (request.isSlow) request.write();
      if (request.isOver) this.requests.delete(id);
      else isSlow ||= request.isSlow;
    }
    if (isSlow && this.ticker === null) {
      this.ticker = setTimeout(() => {
        this.ticker = null;
        this.go();
      }, TICK / 2);
    }
  }

  flush() {
    for (;;) {
      const packet = Buffer.allocUnsafe(PACKET);
      let sent;
      try {
        sent = this.quic.send(packet);
      } catch {
        return;
      }
      if (sent === null) return;
      const [length, { to }] = sent;
      this.socket.send(packet, 0, length, to.port, to.host);
      if (!this.quic.isDraining() && !this.quic.isClosed()) this.feed();
    }
  }

  /** What has gone makes room for more. */
  feed() {
    for (const request of this.requests.values()) if (request.body && !request.isOver) request.write();
  }

  expire() {
    this.quic.onTimeout();
    this.go();
  }

  shutDown() {
    try {
      if (this.isSetUp) this.quic.streamSend(CONTROL, goaway(0), false);
      this.flush();
    } catch {
      // It is on its way out anyway.
    }
    closeQuietly(this.quic, true, H3_NO_ERROR);
    this.flush();
    this.end();
  }

  end() {
    clearTimeout(this.timer);
    clearTimeout(this.ticker);
    clearTimeout(this.settler);
    for (const cid of this.routes.values()) this.site.forget(cid, this);
    this.site.forget(this.original, this);
    this.site.all.delete(this);
  }
}

function closeQuietly(quic, isApplication, code) {
  try {
    quic.close(isApplication, code, Buffer.alloc(0));
  } catch {
    // It is closed already.
  }
}

const hostOf = ({ address, port }) => ({ host: address, port });

/** The server: what it is called, its sockets, and which connection a connection ID belongs to. */
class Site {
  constructor(options, server, tokens, config) {
    this.name = options.name;
    this.retries = options.retry;
    this.server = server;
    this.tokens = tokens;
    this.config = config;
    this.sockets = [];
    this.connections = new Map();
    this.all = new Set();
    this.resetCredit = RESETS_PER_SECOND;
    this.resetTime = performance.now();
    this.complained = -Infinity;
  }

  complain(error) {
    const now = performance.now();
    if (now - this.complained < 1000) return;
    this.complained = now;
    say(error.message);
  }

  forget(cid, connection) {
    const key = keyOf(cid);
    if (this.connections.get(key) === connection) this.connections.delete(key);
  }

  receive(data, socket, address) {
    let header;
    try {
      header = quiche.Header.fromSlice(data, this.server.cidLength);
    } catch {
      return;
    }
    const dcid = Buffer.from(header.dcid);
    const connection = this.connections.get(keyOf(dcid));
    if (connection) connection.receive(data, socket, address);
    else if (header.ty === quiche.Type.Short) this.reset(dcid, data.length, socket, address);
    else if (data.length >= quiche.MIN_CLIENT_INITIAL_LEN) this.begin(header, dcid, data, socket, address);
  }

  /** Answers an unknown connection ID that can only be ours: that of a connection that this server has forgotten. */
  reset(cid, trigger, socket, address) {
    const size = resetSize(trigger);
    if (size === 0 || !this.server.mayReset(cid)) return;
    const now = performance.now();
    const earned = ((now - this.resetTime) / 1000) * RESETS_PER_SECOND;
    this.resetCredit = Math.min(this.resetCredit + earned, RESETS_PER_SECOND);
    this.resetTime = now;
    if (this.resetCredit < 1) return;
    this.resetCredit -= 1;
    socket.send(resetDatagram(this.server.tokenOf(cid), size), address.port, address.address);
  }

  begin(header, dcid, data, socket, address) {
    const scid = Buffer.from(header.scid);
    const out = Buffer.alloc(PACKET);
    if (header.ty === quiche.Type.VersionNegotiation) return;
    if (!quiche.versionIsSupported(header.version)) {
      const length = quiche.negotiateVersion(scid, dcid, out);
      socket.send(out, 0, length, address.port, address.address);
      return;
    }
    if (header.ty !== quiche.Type.Initial || dcid.length < 8 || this.all.size >= MAX_CONNECTIONS) return;
    const token = Buffer.from(header.token ?? []);
    if (token.length) {
      const original = this.tokens.original(header.version, address, dcid, token);
      // routable: quiche goes on with the Retry's SCID as the connection's first CID. Another server's would be routed
      // to that one, so its Retry is good for nothing here: the client begins anew.
      const refused = original === null ? INVALID_TOKEN : this.server.isOwn(dcid) ? null : CONNECTION_REFUSED;
      if (refused === null) this.accept(dcid, original, data, socket, address);
      else if (this.retries) socket.send(refusal(dcid, scid, refused), address.port, address.address);
      else this.accept(this.server.newCid(), null, data, socket, address, dcid); // as if there were no token
    } else if (this.retries) {
      // routable: the Retry's SCID is where the client's next Initial goes to.
      const retryScid = this.server.newCid();
      const made = this.tokens.create(header.version, address, dcid, retryScid);
      const length = quiche.retry(scid, dcid, retryScid, made, header.version, out);
      socket.send(out, 0, length, address.port, address.address);
    } else {
      this.accept(this.server.newCid(), null, data, socket, address, dcid);
    }
  }

  /** routable: the first connection ID, `cid`, and its token in the transport parameters. */
  accept(cid, original, data, socket, address, dcid = cid) {
    this.config.setStatelessResetToken(toNumber(this.server.tokenOf(cid)));
    const quic = quiche.Connection.accept(cid, original, hostOf(socket.bound), hostOf(address), this.config);
    const connection = new Connection(this, quic, original ?? dcid, socket, address);
    this.all.add(connection);
    connection.route(cid);
    if (!original) this.connections.set(keyOf(dcid), connection); // the client uses it until it has seen ours
    connection.receive(data, socket, address);
  }

  async listen(text) {
    const [, host, port] = /^\[?([0-9a-fA-F.:]+)\]?:([0-9]{1,5})$/.exec(text) ?? [];
    const family = isIP(host ?? '');
    if (!family) throw new Refused([`--listen ${text}: expected ADDRESS:PORT`]);
    const socket = createSocket({
      type: `udp${family}`,
      ipv6Only: family === 6,
      recvBufferSize: 1 << 20,
      sendBufferSize: 1 << 20,
      lookup: (name, _, callback) => callback(null, name, family), // addresses only
    });
    await new Promise((resolve, reject) => {
      socket.once('error', (error) => reject(new Error(`--listen ${text}: ${error.message}`)));
      socket.bind(+port, host, resolve);
    });
    socket.removeAllListeners('error');
    socket.on('error', (error) => say(error.message)); // such as a client that is gone
    socket.bound = socket.address();
    socket.on('message', (data, address) => {
      try {
        this.receive(data, socket, address);
      } catch (error) {
        this.complain(error); // whatever a datagram may do, it does not end the process
      }
    });
    this.sockets.push(socket);
  }
}

function quicConfig(options, ticketKey) {
  const config = new quiche.Config();
  const load = (path, act) => {
    try {
      act(path);
    } catch {
      throw new Refused([`${path}: cannot be read, or holds something else than PEM`]);
    }
  };
  load(options.cert, (path) => config.loadCertChainFromPemFile(path));
  load(options.key, (path) => config.loadPrivKeyFromPemFile(path));
  config.setTicketKey(ticketKey);
  config.enableEarlyData();
  config.setApplicationProtos(['h3']);
  config.setMaxIdleTimeout(Math.round(options.idleTimeout * 1000));
  // quiche 0.18 has 128 octets for transport parameters. After a Retry three connection IDs are among them, of up to 20
  // octets each; so the others have to be few and small.
  config.setMaxRecvUdpPayloadSize(1500);
  config.setMaxSendUdpPayloadSize(PACKET);
  config.setInitialMaxData(1 << 20);
  config.setInitialMaxStreamDataBidiRemote(256 << 10);
  config.setInitialMaxStreamDataUni(16383);
  config.setInitialMaxStreamsBidi(MAX_STREAMS);
  config.setInitialMaxStreamsUni(16);
  config.setActiveConnectionIdLimit(MAX_CIDS);
  config.enablePacing(false);
  return config;
}

function takeTokenKeys(options) {
  const keys = options['token-key-file'] ? readKeys(options['token-key-file'], MAX_TOKEN_KEYS) : [randomBytes(32)];
  // quiche takes one key for session tickets, of 48 octets.
  return { tokens: new RetryTokens(keys), ticketKey: derive(keys[0], 'tickets', 48) };
}

function readOptions() {
  const text = { type: 'string' };
  const { values } = parseArgs({
    options: {
      listen: { type: 'string', multiple: true }, 'server-config': text, cert: text, key: text, name: text,
      retry: { type: 'boolean', default: false }, 'token-key-file': text, 'idle-timeout': text,
    },
  });
  const idleTimeout = Number(values['idle-timeout'] ?? 30);
  if (!values.listen?.length || !values['server-config'] || !values.cert || !values.key) throw new Error(USAGE);
  if (!(idleTimeout > 0 && idleTimeout <= 3600)) throw new Error('--idle-timeout: expected seconds, up to 3600');
  return { ...values, idleTimeout };
}

function reload(site, options) {
  let isAnother;
  try {
    // routable: new connection IDs are made as the file says now, on live connections too.
    isAnother = site.server.reload();
    const { tokens, ticketKey } = takeTokenKeys(options);
    if (options['token-key-file']) {
      site.tokens = tokens;
      site.config.setTicketKey(ticketKey);
    }
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    error.lines.forEach(say);
    say('reload refused; what was in use is still');
    return;
  }
  if (isAnother) for (const connection of site.all) connection.renew();
  say('reloaded');
}

async function main() {
  let site;
  let options;
  try {
    options = readOptions();
    const { tokens, ticketKey } = takeTokenKeys(options);
    const config = quicConfig(options, ticketKey);
    site = new Site(options, new Server(options['server-config']), tokens, config);
    for (const address of options.listen) await site.listen(address);
  } catch (error) {
    for (const line of error.lines ?? error.message.split('\n')) say(line);
    process.exit(2);
  }
  process.on('SIGHUP', () => reload(site, options));
  const stop = () => {
    for (const connection of site.all) connection.shutDown();
    // Node sends datagrams at once if the kernel has room, and closes sockets after those that wait.
    for (const socket of site.sockets) socket.close();
  };
  process.on('SIGTERM', stop);
  process.on('SIGINT', stop);
  process.stdout.write(`ready ${site.sockets.map((socket) => shown(socket.bound)).join(' ')}\n`);
}

await main();
