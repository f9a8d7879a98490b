/*
 * The maps: one line each on what it maps. Python fills those that say so, in an order in which no packet sees a
 * half-made table (lb/xdp/image.py), and sets the sizes that are too small here. Names have at most 15 characters: the
 * kernel keeps no more, and a successor finds them by name.
 */
#pragma once
#include "bpf.h"
#include "packet.h"
#include "shared.h"

#define CACHE_LINES 65536
#define PREFIX_BUCKETS 8192

/* Python: an endpoint to the service that listens on it. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct endpoint);
	__type(value, struct service);
} listeners SEC(".maps");

/* What a CPU has looked up in `listeners`: a hash of the endpoint to the endpoint and its service. */
struct listener {
	struct endpoint endpoint;
	__u32 generation; /* valid if it is the present one */
	__u32 zero;
	struct service service;
};
_Static_assert(sizeof(struct listener) == 64, "one cache line");

#define LISTENER_LINES 256
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, LISTENER_LINES);
	__type(key, __u32);
	__type(value, struct listener);
} listener_cache SEC(".maps");

/* Python: service index * CONFIG_SLOTS + config ID to how its CIDs are made. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, MAX_SERVICES * CONFIG_SLOTS);
	__type(key, __u32);
	__type(value, struct cid_config);
} cid_configs SEC(".maps");

/* Python: a server ID of a service and config ID to its backend. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 262144);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct server_key);
	__type(value, struct server);
} servers SEC(".maps");

/* Python: server IDs of dead backends to their reset keys. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 262144);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct server_key);
	__type(value, struct reset_key);
} reset_keys SEC(".maps");

/* Python: a backend's slot to where and how it is. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 16384);
	__type(key, __u32);
	__type(value, struct backend);
} backends SEC(".maps");

/* Python: a service's two rings, each the only element of an array of its own: the one that its listeners name, and
 * the one that is written next. An update of `rings` waits for all CPUs, so it has both from the start. Sizes and no
 * types: clang 14 forgets what a struct is that only a map in a map mentions. */
struct ring_array {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__uint(key_size, sizeof(__u32));
	__uint(value_size, sizeof(struct ring));
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, 2 * MAX_SERVICES);
	__type(key, __u32);
	__array(values, struct ring_array);
} rings SEC(".maps");

/* A 4-tuple to the backend that its unroutable packets go to. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 65536);
	__type(key, struct flow);
	__type(value, struct choice);
} flows SEC(".maps");

/* nat: a 4-tuple and a backend to the port that we use towards it. Python ends idle ones. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1);
	__type(key, struct nat_key);
	__type(value, struct nat_flow);
} nat_out SEC(".maps");

/* nat: a backend and our port to the 4-tuple of the client. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1);
	__type(key, struct return_key);
	__type(value, struct nat_return);
} nat_in SEC(".maps");

/* Python, dnat: a backend's endpoint to what clients know it by. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct endpoint);
	__type(value, struct dnat_return);
} dnat_returns SEC(".maps");

/*
 * What a CPU has decoded: its number * CACHE_LINES + a hash of the CID to the CID and its backend. A miss overwrites
 * one line. Python sizes it. Not a PERCPU_ARRAY, whose elements lie each by itself: that takes two cache misses.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, CACHE_LINES);
	__type(key, __u32);
	__type(value, struct cached);
} cache SEC(".maps");

/* What a CPU knows of the packet that it is at: the stack has no room for it. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct packet);
} current_packet SEC(".maps");

/* A service's index, a backend's slot, and 0, to what was counted. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, MAX_SERVICES);
	__type(key, __u32);
	__type(value, struct service_counters);
} service_count SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 16384);
	__type(key, __u32);
	__type(value, struct backend_counters);
} backend_count SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct total_counters);
} total_count SEC(".maps");

/* A service's index to its bucket for resets; 0 to the one for ICMP errors: each CPU has its own. */
struct bucket {
	__u64 tokens; /* in billionths */
	__u64 filled_at; /* nanoseconds */
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, MAX_SERVICES);
	__type(key, __u32);
	__type(value, struct bucket);
} reset_buckets SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct bucket);
} too_big_bucket SEC(".maps");

/* A hash of a source prefix and a service to that prefix's bucket: for resets, and for new flows. */
struct prefix_bucket {
	__u64 prefix_hash; /* whose it is */
	struct bucket bucket;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, PREFIX_BUCKETS);
	__type(key, __u32);
	__type(value, struct prefix_bucket);
} reset_prefixes SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, PREFIX_BUCKETS);
	__type(key, __u32);
	__type(value, struct prefix_bucket);
} flow_prefixes SEC(".maps");

/* 0 to how often a CPU has asked the generator of unpredictable bits: no input comes twice. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} random_count SEC(".maps");

/* Python: what is sampled, at 0. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct sampling);
} sampling SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 20);
} samples SEC(".maps");

/* Python's own: who is in a backend slot and which service has an index. The program does not read them, but keeps them
 * for a successor. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u32);
	__type(value, struct slot_name);
} backend_names SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_SERVICES);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u32);
	__type(value, struct slot_name);
} service_names SEC(".maps");

/* Set when the program is loaded, and constant to the verifier, which leaves out what they rule out. */
const volatile struct settings settings SEC(".rodata.settings");

/*
 * Changes with every change of listeners, CID configurations, servers or backends' slots: what was cached before is
 * void.
 */
volatile __u32 generation SEC(".data.generation") = 1;
