/*
 * Which backend a connection ID, or failing that a 4-tuple, belongs to: the C twin of lb/routing.py's RoutingTable,
 * whose contents come from there.
 */
#pragma once
#include "cid.h"
#include "maps.h"
#include "packet.h"

/* The octets of a CID as they lie in memory, and whose it is: what is looked up in the cache. */
struct cid {
	__u64 octets_0;
	__u64 octets_8;
	__u32 octets_16;
	__u32 service; /* index */
	__u32 config_id; /* is in octets_0 too, for which it need not wait */
};

/* What a CID, or a 4-tuple, leads to. */
struct found {
	struct backend *backend; /* NULL: nowhere */
	struct reset_key *reset_key; /* of a dead server that has one */
	__u32 slot; /* the backend's */
};

#define ROUTABLE UNROUTABLES /* what by_cid answers otherwise is an enum unroutable */

/*
 * Reads the first octets of a DCID: what is not there is zeros, and what belongs to somebody else is for masks to take
 * away. `dcid` is packet->dcid as a pointer.
 */
static __always_inline void load_cid(struct xdp_md *ctx, const struct packet *packet, const __u8 *dcid, const void *end,
				     struct cid *cid)
{
	__u32 length = packet->dcid_length;

	if (likely((const void *)(dcid + MAX_CID) <= end)) {
		cid->config_id = *(const volatile __u8 *)dcid >> 5;
		cid->octets_0 = *(const __u64 *)dcid;
		cid->octets_8 = *(const __u64 *)(dcid + 8);
		cid->octets_16 = *(const __u32 *)(dcid + 16);
		return;
	}
	*cid = (struct cid){};
	if (length > MAX_CID)
		length = MAX_CID;
	barrier_var(length); /* verifier: it is to see the comparison of what is passed on */
	if (length > 0)
		bpf_xdp_load_bytes(ctx, packet->dcid, cid, length);
	cid->config_id = (cid->octets_0 & 0xff) >> 5;
}

static __always_inline struct cached *cache_line(const struct cid *cid)
{
	__u64 hash = (cid->octets_0 ^ (cid->octets_8 << 29 | cid->octets_8 >> 35) ^ cid->octets_16) * HASH_MULTIPLIER;
	__u32 line = bpf_get_smp_processor_id() * CACHE_LINES + (hash >> 48);

	_Static_assert(CACHE_LINES == 1 << 16, "16 bits of the hash");
	return bpf_map_lookup_elem(&cache, &line);
}

/*
 * Decrypts a single-pass CID in place, as far as its server ID. That is cheaper than to cache CIDs: their lines would
 * be more than the processor's own cache has, those of servers are not.
 */
static __noinline void decrypt_single_pass(const struct cid_config *config, struct cid *cid)
{
	struct server_key key = {};
	__u64 id[2];

	cid_server_id(config, cid->octets_0, cid->octets_8, cid->octets_16, &key);
	__builtin_memcpy(id, key.server_id, sizeof(id));
	cid->octets_0 = cid->config_id << 5 | id[0] << 8;
	cid->octets_8 = id[0] >> 56 | id[1] << 8;
	cid->octets_16 = id[1] >> 56;
}

/* Looks up the server of a CID, which only four-pass encrypts now. Returns what by_cid does. */
static __noinline int find_server(const struct cid_config *config, const struct cid *cid, struct found *found)
{
	struct server_key key = {};
	__u64 id[2] = { cid->octets_0 >> 8 | cid->octets_8 << 56, cid->octets_8 >> 8 | (__u64)cid->octets_16 << 56 };
	struct server *server;

	if (config->algorithm == ALGORITHM_FOUR_PASS)
		cid_server_id(config, cid->octets_0, cid->octets_8, cid->octets_16, &key);
	else
		__builtin_memcpy(key.server_id, id, sizeof(id));
	key.service_and_config = cid->service << 8 | cid->config_id;
	server = bpf_map_lookup_elem(&servers, &key);
	if (!server)
		return UNROUTABLE_UNKNOWN_SERVER;
	found->slot = server->backend;
	found->backend = bpf_map_lookup_elem(&backends, &server->backend);
	if (!found->backend || !found->backend->incarnation)
		return UNROUTABLE_UNKNOWN_SERVER;
	if (likely(found->backend->action < ACTION_RESET))
		return ROUTABLE;
	if (found->backend->action == ACTION_RESET)
		found->reset_key = bpf_map_lookup_elem(&reset_keys, &key);
	return UNROUTABLE_DEAD_SERVER;
}

/*
 * The server that a CID was made for (section 4.1 of the draft), or why there is none. The tests are in the order of
 * lb/routing.py. `length` is how many octets the packet has for the CID.
 */
static __always_inline int by_cid(const struct service *service, struct cid *cid, __u32 length, struct found *found)
{
	__u32 config_index = service->index * CONFIG_SLOTS + cid->config_id;
	__u32 now = generation; /* before anything that it vouches for is read */
	const struct cid_config *config;
	struct cached *cached;
	int answer;

	if (!length)
		return UNROUTABLE_NO_CID;
	config = bpf_map_lookup_elem(&cid_configs, &config_index);
	if (!config || config->algorithm == ALGORITHM_NONE)
		return cid->config_id == UNROUTABLE_CONFIG_ID ? UNROUTABLE_CODEPOINT_7 : UNROUTABLE_NO_CONFIG;
	if (length < config->block_end)
		return UNROUTABLE_TOO_SHORT;

	cid->octets_0 &= config->cid_mask[0];
	cid->octets_8 &= config->cid_mask[1];
	cid->octets_16 &= config->cid_mask[2];
	cid->service = service->index;
	if (config->algorithm == ALGORITHM_SINGLE_PASS)
		decrypt_single_pass(config, cid);

	cached = cache_line(cid);
	if (cached && cached->cid[0] == cid->octets_0 && cached->cid[1] == cid->octets_8 &&
	    cached->cid_end == cid->octets_16 && cached->service == cid->service && cached->generation == now) {
		found->slot = cached->backend;
		found->backend = bpf_map_lookup_elem(&backends, &cached->backend);
		if (found->backend && found->backend->incarnation && likely(found->backend->action < ACTION_RESET))
			return ROUTABLE;
		/* What becomes of a dead one takes its server ID. */
	}

	answer = find_server(config, cid, found);
	if (cached && answer == ROUTABLE) {
		cached->cid[0] = cid->octets_0;
		cached->cid[1] = cid->octets_8;
		cached->cid_end = cid->octets_16;
		cached->service = cid->service;
		cached->backend = found->slot;
		cached->generation = now;
	}
	return answer;
}

/* The ring slot of a 4-tuple: lb/routing.py has the same arithmetic, with words in network order. */
static __always_inline __u32 ring_slot(const struct flow *flow, __u64 seed)
{
	__u64 words[5] = {
		be64_to_cpu(flow->client.halves[0]),
		be64_to_cpu(flow->client.halves[1]),
		be64_to_cpu(flow->local.halves[0]),
		be64_to_cpu(flow->local.halves[1]),
		(__u32)bpf_ntohs(flow->client_port) << 16 | bpf_ntohs(flow->local_port),
	};
	__u64 hash = seed;

#pragma unroll
	for (int i = 0; i < 5; i++) {
		hash = (hash ^ words[i]) * HASH_MULTIPLIER;
		hash ^= hash >> 32;
	}
	return hash % RING_SLOTS;
}

/* The backend's slot that the ring gives a 4-tuple; NO_BACKEND_SLOT without one. */
static __always_inline __u32 fallback(const struct service *service, const struct flow *flow)
{
	void *ring_array = bpf_map_lookup_elem(&rings, &service->ring);
	__u32 slot = ring_slot(flow, service->ring_seed), zero = 0;
	struct ring *ring;

	if (!ring_array)
		return NO_BACKEND_SLOT;
	ring = bpf_map_lookup_elem(ring_array, &zero);
	barrier_var(slot);
	if (!ring || slot >= RING_SLOTS) /* verifier: neither ever is */
		return NO_BACKEND_SLOT;
	return ring->backend[slot];
}

/* The backend that is remembered for a 4-tuple, NULL if it should not get this packet any more. */
static __always_inline struct backend *remembered(const struct packet *packet, __u32 *slot)
{
	struct choice *choice = bpf_map_lookup_elem(&flows, &packet->flow);
	struct backend *backend;

	if (!choice)
		return NULL;
	*slot = choice->backend;
	backend = bpf_map_lookup_elem(&backends, slot);
	if (!backend || !backend->incarnation || backend->incarnation != choice->incarnation)
		return NULL;
	/* An established connection waits for the hold-off; a handshake had better begin elsewhere. */
	if (backend->action == ACTION_FORWARD || (backend->action == ACTION_FORWARD_DOWN && !packet->is_long))
		return backend;
	return NULL;
}
