/*
 * An msquic server that knows no connection: it answers short headers with the stateless resets of its key.
 *
 *     server KEY    the key in hex; prints the port that it listens on
 */
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include <msquic.h>

static QUIC_STATUS QUIC_API refuse(HQUIC listener, void *context, QUIC_LISTENER_EVENT *event)
{
	(void)listener, (void)context, (void)event;
	return QUIC_STATUS_NOT_SUPPORTED;
}

int main(int argc, char **argv)
{
	const QUIC_REGISTRATION_CONFIG called = { "reset", QUIC_EXECUTION_PROFILE_LOW_LATENCY };
	const QUIC_BUFFER alpn = { 2, (uint8_t *)"h3" };
	const QUIC_API_TABLE *quic;
	HQUIC registration, listener;
	QUIC_ADDR address = { 0 };
	uint32_t size = sizeof(address);
	uint8_t key[QUIC_STATELESS_RESET_KEY_LENGTH];

	if (argc != 2 || strlen(argv[1]) != 2 * sizeof(key))
		return 2;
	for (size_t i = 0; i < sizeof(key); i++)
		sscanf(argv[1] + 2 * i, "%2hhx", &key[i]);
	QuicAddrSetFamily(&address, QUIC_ADDRESS_FAMILY_INET);
	address.Ipv4.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	/* The key can be set once there is something that could use it. */
	if (QUIC_FAILED(MsQuicOpen2(&quic)) || QUIC_FAILED(quic->RegistrationOpen(&called, &registration)) ||
	    QUIC_FAILED(quic->ListenerOpen(registration, refuse, NULL, &listener)) ||
	    QUIC_FAILED(quic->SetParam(NULL, QUIC_PARAM_GLOBAL_STATELESS_RESET_KEY, sizeof(key), key)) ||
	    QUIC_FAILED(quic->ListenerStart(listener, &alpn, 1, &address)) ||
	    QUIC_FAILED(quic->GetParam(listener, QUIC_PARAM_LISTENER_LOCAL_ADDRESS, &size, &address)))
		return 1;
	printf("%u\n", QuicAddrGetPort(&address));
	fflush(stdout);
	for (;;)
		pause();
}
