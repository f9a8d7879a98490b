/*
 * Which service a packet is for.
 */
#pragma once
#include "maps.h"
#include "packet.h"

/* The service that listens on an endpoint. With port 0: some service that listens on that address. */
static __noinline struct service *find_service(const union address *address, __be16 port)
{
	struct endpoint endpoint = { .address = *address, .port = port };

	return bpf_map_lookup_elem(&listeners, &endpoint);
}

/* The same for nearly every packet, at a fifth of the price: no helper, and no hash over 24 octets. */
static __always_inline struct service *find_listener(const union address *address, __be16 port)
{
	__u64 hash = (address->halves[0] + (address->halves[1] ^ port)) * HASH_MULTIPLIER;
	__u32 line = hash / (~0ULL / LISTENER_LINES + 1), now = generation;
	struct listener *known = bpf_map_lookup_elem(&listener_cache, &line);
	struct service *service;

	if (!known || !port) /* verifier: every line exists; port 0 stands for the address */
		return NULL;
	if (likely(known->generation == now && known->endpoint.address.halves[0] == address->halves[0] &&
		   known->endpoint.address.halves[1] == address->halves[1] && known->endpoint.port == port))
		return &known->service;
	service = find_service(address, port);
	if (!service)
		return NULL;
	known->endpoint.address = *address;
	known->endpoint.port = port;
	known->service = *service;
	known->generation = now;
	return &known->service;
}
