// Reads what `quiclb server-config --format envoy` made, as JSON on standard input, with the messages and the rules
// that Envoy's API publishes. Says what it read, or exits with 1 and the reason.
package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"

	listener "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	quiclb "github.com/envoyproxy/go-control-plane/envoy/extensions/quic/connection_id_generator/quic_lb/v3"
	tls "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
)

type message interface {
	proto.Message
	ValidateAll() error
}

func read(octets []byte, into message) error {
	if err := protojson.Unmarshal(octets, into); err != nil { // refuses unknown fields
		return err
	}
	return into.ValidateAll()
}

func check() error {
	input, err := io.ReadAll(os.Stdin)
	if err != nil {
		return err
	}
	var files struct {
		Generator json.RawMessage `json:"generator"`
		Secret    json.RawMessage `json:"secret"`
	}
	if err := json.Unmarshal(input, &files); err != nil {
		return err
	}

	var options listener.QuicProtocolOptions
	if err := read(files.Generator, &options); err != nil {
		return err
	}
	var config quiclb.Config
	if err := options.GetConnectionIdGeneratorConfig().GetTypedConfig().UnmarshalTo(&config); err != nil {
		return err
	}
	if err := config.ValidateAll(); err != nil {
		return err
	}

	var response discovery.DiscoveryResponse
	if err := read(files.Secret, &response); err != nil {
		return err
	}
	var secret tls.Secret
	if len(response.Resources) != 1 {
		return fmt.Errorf("%d resources", len(response.Resources))
	}
	if err := response.Resources[0].UnmarshalTo(&secret); err != nil {
		return err
	}
	if err := secret.ValidateAll(); err != nil {
		return err
	}
	secrets := secret.GetGenericSecret().GetSecrets()
	return json.NewEncoder(os.Stdout).Encode(map[string]any{
		"extension":    options.GetConnectionIdGeneratorConfig().GetName(),
		"server_id":    config.GetServerId().GetInlineBytes(),
		"expected":     config.GetExpectedServerIdLength(),
		"nonce_length": config.GetNonceLengthBytes(),
		"unencrypted":  config.GetUnencryptedMode(),
		"secret":       config.GetEncryptionParameters().GetName(),
		"path":         config.GetEncryptionParameters().GetSdsConfig().GetPathConfigSource().GetPath(),
		"name":         secret.GetName(),
		"key":          secrets["encryption_key"].GetInlineBytes(),
		"version":      secrets["configuration_version"].GetInlineBytes(),
	})
}

func main() {
	if err := check(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
