/*
 * The xdp engine's program: what lb/router.py decides about a datagram, and then its way to a backend. It reads as a
 * packet flows.
 */
#include "bpf.h"
#include "count.h"
#include "decode.h"
#include "forward.h"
#include "icmp.h"
#include "limit.h"
#include "listen.h"
#include "maps.h"
#include "nat.h"
#include "packet.h"
#include "parse.h"
#include "quic.h"
#include "reset.h"

/*
 * A fragment of a datagram to an address that clients send to. QUIC's are never fragmented (RFC 9000, section 14), and
 * only the first one would say which backend it is for.
 */
static __noinline int drop_fragment(struct xdp_md *ctx, struct packet *packet)
{
	struct service *service = find_service(&packet->flow.local, 0), *of_port = NULL;
	struct service_counters *counted;

	if (!service)
		return XDP_PASS;
	if (packet->fragment == FIRST_FRAGMENT)
		of_port = find_service(&packet->flow.local, packet->flow.local_port);
	if (of_port)
		service = of_port;
	counted = bpf_map_lookup_elem(&service_count, &service->index);
	if (counted)
		count_verdict(ctx, service, counted, VERDICT_FRAGMENT);
	return XDP_DROP;
}

/* A packet that is for no listener: perhaps a backend's answer. */
static __always_inline int from_backend(struct xdp_md *ctx, struct packet *packet)
{
	if (packet->is_malformed)
		return XDP_PASS;
	if (settings.forward_mode == FORWARD_NAT && is_our_source(&packet->flow.local))
		return nat_return(ctx, packet);
	if (settings.forward_mode == FORWARD_DNAT)
		return dnat_return(ctx, packet);
	return XDP_PASS;
}

/* Steps 4 and 5 of lb/router.py: a backend for an unroutable packet. Returns a verdict. */
static __noinline int by_flow(const struct service *service, const struct packet *packet, struct found *found)
{
	struct choice choice;

	found->backend = remembered(packet, &found->slot);
	if (found->backend)
		return VERDICT_TABLE_FLOW;
	found->slot = fallback(service, &packet->flow);
	found->backend = bpf_map_lookup_elem(&backends, &found->slot);
	if (!found->backend || !found->backend->incarnation)
		return VERDICT_NO_BACKEND;
	if (!new_flow_allowed(service, &packet->flow.client))
		return VERDICT_NEW_FLOW_LIMIT;
	choice.backend = found->slot;
	choice.incarnation = found->backend->incarnation;
	if (bpf_map_update_elem(&flows, &packet->flow, &choice, BPF_ANY))
		drop_for(FAILURE_MAP_FULL); /* not the packet: only what would have been remembered */
	return VERDICT_FALLBACK;
}

/* The forwarding steps of the draft (section 4.2), as lb/router.py has them. Returns a verdict. */
static __always_inline int route(struct xdp_md *ctx, const struct cursor *cursor, struct packet *packet,
				 struct service *service, struct service_counters *counted, struct found *found)
{
	const __u8 *payload = cursor->frame + cursor->at;
	struct quic_header quic;
	struct cid cid;
	int reason;

	if (unlikely(packet->is_malformed))
		return VERDICT_MALFORMED;
	if (unlikely(!packet->payload_length))
		return VERDICT_EMPTY;
	if (unlikely(parse_quic(payload, cursor->end, packet->payload_length, &quic)))
		return VERDICT_MALFORMED;
	packet->is_long = !!quic.is_long;
	packet->dcid = cursor->at + quic.dcid;
	packet->dcid_length = quic.dcid_length < 255 ? quic.dcid_length : 255;
	load_cid(ctx, packet, payload + quic.dcid, cursor->end, &cid);

	reason = by_cid(service, &cid, quic.dcid_length, found);
	if (likely(reason == ROUTABLE)) {
		counted->config_ids[cid.config_id]++;
		return found->backend->action == ACTION_FORWARD ? VERDICT_CID : VERDICT_CID_DOWN;
	}
	if (found->reset_key && !quic.is_long)
		return send_reset(ctx, packet, service, found->reset_key);
	counted->unroutable[reason]++;
	/* A long header's DCID may be the client's own choice, and then it means nothing that it decodes to nobody. */
	if (reason == UNROUTABLE_UNKNOWN_SERVER && service->drops_unknown_servers && !quic.is_long)
		return VERDICT_UNKNOWN_SERVER;
	return by_flow(service, packet, found);
}

/* The chosen backend gets the packet, in the manner of the mode. */
static __always_inline int send_to_backend(struct xdp_md *ctx, struct packet *packet, struct service *service,
					   const struct found *found, __u32 verdict)
{
	const struct backend *backend = found->backend;
	int more = growth(packet, backend->is_ipv6), action;
	struct backend_counters *counted;

	if (unlikely(!is_resolved(backend)))
		return drop_for(FAILURE_UNREACHABLE);
	if (unlikely(packet->ip_length + more > backend->mtu)) {
		drop_for(FAILURE_TOO_LARGE);
		return send_too_big(ctx, packet, backend->mtu - more);
	}
	if (settings.forward_mode == FORWARD_NAT)
		action = nat_send(ctx, packet, service, found, verdict);
	else if (settings.forward_mode == FORWARD_DNAT)
		action = dnat_send(ctx, packet, backend);
	else
		action = send_whole(ctx, packet, backend);
	if (unlikely(action != XDP_TX))
		return action;
	counted = bpf_map_lookup_elem(&backend_count, &found->slot);
	if (counted) {
		counted->datagrams_to++;
		counted->octets_to += packet->payload_length;
	}
	return XDP_TX;
}

SEC("xdp.frags")
int quiclb(struct xdp_md *ctx)
{
	struct cursor cursor = frame_of(ctx);
	struct service_counters *counted;
	struct found found = {};
	__u32 zero = 0, verdict;
	struct service *service;
	struct packet *packet;
	int protocol;

	packet = bpf_map_lookup_elem(&current_packet, &zero);
	if (!packet)
		return XDP_PASS; /* verifier: it is there */
	protocol = parse_ip(&cursor, packet);
	if (unlikely(protocol == (packet->is_ipv6 ? IPPROTO_ICMPV6 : IPPROTO_ICMP)))
		return icmp_error(ctx, packet, &found);
	if (protocol != IPPROTO_UDP || parse_udp(ctx, &cursor, packet))
		return XDP_PASS;
	if (unlikely(packet->fragment))
		return drop_fragment(ctx, packet);
	service = find_listener(&packet->flow.local, packet->flow.local_port);
	if (!service)
		return from_backend(ctx, packet);
	counted = bpf_map_lookup_elem(&service_count, &service->index);
	if (!counted)
		return XDP_PASS; /* verifier: every service has counters */

	verdict = route(ctx, &cursor, packet, service, counted, &found);
	count_verdict(ctx, service, counted, verdict);
	if (unlikely(verdict > VERDICT_FALLBACK))
		return verdict == VERDICT_RESET ? XDP_TX : XDP_DROP;
	return send_to_backend(ctx, packet, service, &found, verdict);
}

char _license[] SEC("license") = "GPL";
