/*
 * What the program and Python both know: numbers, sizes, layouts. lb/xdp/layout.py is the twin of this file and a test
 * compares the two. Multi-octet fields are in host order unless they are __be16 or an address.
 */
#pragma once
#include <linux/types.h>

/* The specification's: draft-ietf-quic-load-balancers, RFC 8999, RFC 9000. */
#define CONFIG_IDS 7 /* section 3.1; the eighth, 0b111, marks unroutable CIDs */
#define CONFIG_SLOTS 8
#define UNROUTABLE_CONFIG_ID 7
#define LENGTH_BITS 0x1f /* of a CID's first octet: how many follow, if its configuration says so */
#define MAX_CID 20 /* octets, in QUIC v1 */
#define AES_BLOCK 16
#define RESET_TOKEN 16

/* Ours; lb/routing.py has the same. */
#define RING_SLOTS 65537
#define HASH_MULTIPLIER 0x9e3779b97f4a7c15ULL /* 2^64 / golden ratio, odd */
#define MAX_SERVICES 256
#define NO_BACKEND_SLOT 0xffff
#define RESET_KEY 56 /* octets: as many as one block of SHA-256 has room for, less one for the end of the message */
#define RESET_SUFFIX 40

/* How packets reach a backend. */
enum forward_mode {
	FORWARD_NAT, /* both addresses rewritten, state for the way back: what the udp engine's backends see */
	FORWARD_DNAT, /* the destination rewritten; the way back is through the balancer */
	FORWARD_L2, /* the MAC address rewritten; the backend answers directly */
	FORWARD_IPIP, /* IP in IP (RFC 2003, RFC 2473, RFC 4213); the backend answers directly */
	FORWARD_GUE, /* the same in UDP (GUE variant 1, draft-ietf-intarea-gue) */
};

/* What became of a datagram: lb.router.Verdict. */
enum verdict {
	VERDICT_CID,
	VERDICT_CID_DOWN,
	VERDICT_TABLE_SCID, /* udp engine only */
	VERDICT_TABLE_DCID, /* udp engine only */
	VERDICT_TABLE_FLOW,
	VERDICT_FALLBACK,
	VERDICT_RESET,
	VERDICT_EMPTY,
	VERDICT_MALFORMED,
	VERDICT_UNKNOWN_SERVER,
	VERDICT_NO_BACKEND,
	VERDICT_NEW_FLOW_LIMIT,
	VERDICT_RESET_TOO_SMALL,
	VERDICT_RESET_LIMITED,
	VERDICT_FRAGMENT, /* xdp engine only */
	VERDICTS,
};

/* Why a DCID was unroutable: lb.routing.Unroutable. */
enum unroutable {
	UNROUTABLE_NO_CID,
	UNROUTABLE_NO_CONFIG,
	UNROUTABLE_CODEPOINT_7,
	UNROUTABLE_TOO_SHORT,
	UNROUTABLE_UNKNOWN_SERVER,
	UNROUTABLE_DEAD_SERVER,
	UNROUTABLES,
};

/* What becomes of CIDs of a backend: lb.routing.Action. A dead backend has RESET whether or not there are reset keys:
 * a server ID that has none in `reset_keys` falls through. */
enum action {
	ACTION_FORWARD,
	ACTION_FORWARD_DOWN,
	ACTION_RESET,
	ACTION_FALL_THROUGH,
};

/* Why a packet could not be sent: lb.engine.Drop.ALL. */
enum failure {
	FAILURE_BUFFER_FULL, /* udp engine only */
	FAILURE_TOO_LARGE, /* longer than the way to the backend allows; ICMP says so to the sender */
	FAILURE_UNREACHABLE, /* the backend's next hop has no known MAC address */
	FAILURE_NO_SOCKET, /* nat: no free port towards the backend */
	FAILURE_NO_FLOW, /* an ICMP error or a reply for a flow that is not there any more */
	FAILURE_HOP_LIMIT, /* TTL or hop limit used up */
	FAILURE_NO_CHECKSUM, /* UDP without checksum cannot become IPv6 */
	FAILURE_MAP_FULL, /* the 4-tuple table took no entry: routed without memory */
	FAILURES,
};

/* How a reset token follows from a CID: lb.reset_scheme.Arithmetic. */
enum token_arithmetic {
	TOKEN_HMAC, /* HMAC(key, CID || suffix) */
	TOKEN_HKDF, /* HMAC(HMAC(CID, key), suffix) */
	TOKEN_HASH, /* SHA-256(key || CID, zeros up to MAX_CID || its length) */
};

enum algorithm { ALGORITHM_NONE, ALGORITHM_PLAINTEXT, ALGORITHM_SINGLE_PASS, ALGORITHM_FOUR_PASS };

/* As on the wire; IPv4 as an IPv4-mapped IPv6 address. */
union address {
	__u8 octets[16];
	__u32 words[4];
	__u64 halves[2];
};

/* Read-only once loaded. */
struct settings {
	__u32 forward_mode;
	__u8 constant_time; /* AES without tables, for those who share caches with strangers */
	__u8 interface_mac[6];
	__u8 zero[5];
	union address source_ipv4; /* nat: what backends see; tunnels: the outer source; all zero: there is none */
	union address source_ipv6;
	__u16 nat_port_first; /* ports towards backends, host order */
	__u16 nat_port_count;
	__u32 interface_mtu; /* longest IP packet that the interface takes */
	__u64 hash_seed; /* nobody knows it: where prefixes lie in the buckets, which port is tried first */
	__u32 random_key[44]; /* AES-128 encryption key schedule of the generator of unpredictable bits */
};

/* An address and a UDP port. As a key of `listeners` with port 0: any address that clients send to. */
struct endpoint {
	union address address;
	__be16 port;
	__u16 zero;
	__u32 zero_too;
};

struct service {
	__u64 ring_seed;
	__u32 index; /* in service_count; times CONFIG_SLOTS, plus config ID, in cid_configs */
	__u32 drops_unknown_servers;
	__u32 new_flows_rate; /* fallback decisions per second and source prefix; 0: no limit */
	__u32 reset_rate; /* resets per second and CPU; 0: no limit */
	__u32 reset_prefix_rate; /* resets per second and source prefix; 0: no limit */
	__u32 ring; /* in rings */
};

/*
 * A CID configuration. Masks are over octets as they lie in memory. The routing block is the block_length octets after
 * the first one. Its left half is under left_mask from the block's start, its right half under right_mask from
 * `right_at` octets after that (an odd length shares the middle octet: the masks split it).
 */
struct cid_config {
	__u8 algorithm;
	__u8 block_length; /* server ID and nonce */
	__u8 block_end; /* 1 + block_length: octets of a CID that must be there */
	__u8 cid_length; /* of a whole CID, appended octets included */
	__u8 encodes_length;
	__u8 right_at; /* block_length / 2 */
	__u8 needs_last_pass; /* the server ID reaches into the right half */
	__u8 server_id_length;
	__u64 left_mask[2];
	__u64 right_mask[2];
	__u64 server_id_mask[2];
	__u64 cid_mask[3]; /* of CID octets 0..7, 8..15, 16..19: the bits that the server depends on */
	__u32 encrypt_key[44]; /* AES-128 key schedules: little-endian words of the columns */
	__u32 decrypt_key[44]; /* of the equivalent inverse cipher (FIPS 197, section 5.3.5) */
	__u64 sliced_key[22]; /* the encryption key schedule in bit planes, for the constant-time build */
};

struct server_key {
	__u32 service_and_config; /* service index << 8 | config ID */
	__u8 server_id[16]; /* zeros behind it */
};

struct server {
	__u32 backend;
};

/* There for the servers of dead backends only. With TOKEN_HMAC Python writes zeros to `inner` and `outer`, and the
 * program fills them in when it first needs them: the state of SHA-256 behind the inner and the outer key pad of HMAC. */
struct reset_key {
	__u8 key[RESET_KEY]; /* zeros behind it; and behind the suffix */
	__u8 suffix[RESET_SUFFIX];
	__u32 inner[8];
	__u32 outer[8];
	__u32 is_prepared;
	__u8 arithmetic;
	__u8 key_length;
	__u8 suffix_length;
	__u8 zero;
};

/* One cache line. */
struct backend {
	union address address; /* nat, dnat: the new destination; tunnels: the outer one */
	__be16 port;
	__u8 next_hop[6]; /* MAC address; zeros: not known */
	__u32 incarnation; /* 0: nobody is here; another number for everybody who is ever put here */
	__u8 action;
	__u8 is_ipv6;
	__u16 mtu; /* longest IP packet on the way to it */
	__u32 service; /* index of its service */
	__u32 last_incarnation; /* Python's: of whoever is here, or was here last */
	__u32 zero[6];
};

struct ring {
	__u16 backend[RING_SLOTS];
	__u16 zero[3];
};

/* A 4-tuple. */
struct flow {
	union address client;
	union address local;
	__be16 client_port;
	__be16 local_port;
	__u32 zero;
};

struct choice {
	__u32 backend;
	__u32 incarnation;
};

/* nat: a client's 4-tuple and a backend, and what is known of them. One client socket may carry connections to several
 * backends. */
struct nat_key {
	union address client;
	union address local;
	__be16 client_port;
	__be16 local_port;
	__u32 backend;
};

struct nat_flow {
	__be16 port; /* ours, towards the backend */
	__u8 client_mac[6]; /* of whoever brought the last packet */
	__u8 cid[MAX_CID]; /* the first octets after the first of the last short header that was routed by CID */
	__u8 cid_octets; /* how many of them were there; 0: there was no such packet */
	__u8 short_header_seen;
	__u8 zero[2];
	__u32 incarnation; /* of the backend */
	__u32 datagrams_to;
};

/* nat: the same from the backend's side. */
struct return_key {
	union address backend;
	__be16 backend_port;
	__be16 port; /* ours */
	__u32 zero;
};

struct nat_return {
	struct flow flow;
	__u32 backend;
	__u8 client_mac[6];
	__u16 zero;
	__u32 datagrams_from;
};

/* dnat: what clients know a backend's endpoint by. */
struct dnat_return {
	union address address;
	__be16 port;
	__u16 zero;
	__u32 backend;
};

/* Decoded CIDs, one line each; valid if `generation` is the present one. */
struct cached {
	__u64 cid[2];
	__u32 cid_end;
	__u32 service;
	__u32 backend;
	__u32 generation; /* never 0 */
};

struct service_counters {
	__u64 verdicts[VERDICTS];
	__u64 unroutable[UNROUTABLES];
	__u64 config_ids[CONFIG_IDS]; /* datagrams routed by CID */
	__u64 moves; /* nat: new flows that began with a routable CID on a short header */
	__u64 rescued; /* nat: those of them whose 4-tuple hashes to another backend */
};

struct backend_counters {
	__u64 datagrams_to; /* UDP payloads */
	__u64 octets_to;
	__u64 datagrams_from; /* nat, dnat */
	__u64 octets_from;
	__u64 unreachable; /* nat: ICMP errors that the backend, or its network, returned */
	__u64 zero[3];
};

struct total_counters {
	__u64 failures[FAILURES];
	__u64 icmp_forwarded; /* ICMP errors from clients' networks that reached a backend */
	__u64 too_big_sent; /* ICMP "fragmentation needed", ICMPv6 "packet too big" */
	__u64 too_big_limited;
	__u64 samples_lost;
};

/* Debugging: the first octets of some packets. Python changes `sampling`, the program reads it. */
#define SAMPLE_OCTETS 128
struct sampling {
	__u32 every; /* one packet in so many; 0: none */
	__u32 verdicts; /* of these verdicts only: bits 1 << verdict; 0: of all */
};

struct sample {
	__u32 verdict;
	__u32 length; /* of the frame */
	__u32 service;
	__u32 captured; /* octets of `octets` */
	__u8 octets[SAMPLE_OCTETS];
};

/* Who is in a slot: "service/backend", or "service". The program does not read it. */
#define SLOT_NAME 136
struct slot_name {
	char name[SLOT_NAME];
};

_Static_assert(sizeof(struct settings) == 240, "layout.py: Settings");
_Static_assert(sizeof(struct endpoint) == 24, "layout.py: Endpoint");
_Static_assert(sizeof(struct service) == 32, "layout.py: Service");
_Static_assert(sizeof(struct cid_config) == 608, "layout.py: CidConfig");
_Static_assert(sizeof(struct server_key) == 20, "layout.py: ServerKey");
_Static_assert(sizeof(struct reset_key) == 168, "layout.py: ResetKey");
_Static_assert(sizeof(struct backend) == 64, "layout.py: Backend");
_Static_assert(sizeof(struct ring) == 131080, "layout.py: Ring");
_Static_assert(sizeof(struct flow) == 40, "layout.py: Flow");
_Static_assert(sizeof(struct nat_key) == 40, "layout.py: NatKey");
_Static_assert(sizeof(struct nat_flow) == 40, "layout.py: NatFlow");
_Static_assert(sizeof(struct return_key) == 24, "layout.py: ReturnKey");
_Static_assert(sizeof(struct nat_return) == 56, "layout.py: NatReturn");
_Static_assert(sizeof(struct dnat_return) == 24, "layout.py: DnatReturn");
_Static_assert(sizeof(struct service_counters) == 240, "layout.py: ServiceCounters");
_Static_assert(sizeof(struct backend_counters) == 64, "layout.py: BackendCounters");
_Static_assert(sizeof(struct total_counters) == 96, "layout.py: TotalCounters");
_Static_assert(sizeof(struct sample) == 144, "layout.py: Sample");
_Static_assert(sizeof(struct cached) == 32, "one half of a cache line");
