package quiclb

import (
	"bytes"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"reflect"
	"sync"

	"github.com/quic-go/quic-go"
)

// Server is one routable server: its configuration, and what quic-go needs of it.
type Server struct {
	path      string
	generator *Generator
	resetKey  *quic.StatelessResetKey // nil: no resets
	tokenKeys [][]byte

	mutex  sync.Mutex
	config *ServerConfig
	left   []*ServerConfig // by which connection IDs are made no more
}

// Load reads a server's file and, unless its name is empty, the file of keys that address validation tokens and session
// tickets of the fleet are made with.
func Load(path, tokenKeyFile string) (*Server, error) {
	config, err := LoadServerConfig(path)
	if err != nil {
		return nil, err
	}
	server := &Server{path: path, config: config}
	if tokenKeyFile != "" {
		if server.tokenKeys, err = ReadTokenKeys(tokenKeyFile); err != nil {
			return nil, err
		}
	}
	if config.ResetKey != nil {
		server.resetKey = (*quic.StatelessResetKey)(config.ResetKey)
	}
	server.generator, err = NewGenerator(config)
	return server, err
}

// Config is the configuration in force.
func (s *Server) Config() *ServerConfig {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	return s.config
}

// Generator issues this server's connection IDs.
func (s *Server) Generator() *Generator {
	return s.generator
}

// Transport is a quic.Transport on a socket, with everything that makes it routable.
func (s *Server) Transport(socket *net.UDPConn) *quic.Transport {
	transport := &quic.Transport{
		Conn:                  NewConn(socket, s.generator),
		ConnectionIDGenerator: s.generator,
		StatelessResetKey:     s.resetKey,
	}
	if len(s.tokenKeys) > 0 {
		// quic-go knows one key: the others are for the time when servers have different first ones, and only for tickets.
		key := quic.TokenGeneratorKey(derive(s.tokenKeys[0], "quiclb quic-go token"))
		transport.TokenGeneratorKey = &key
	}
	return transport
}

// ShareTickets lets every server with the same token keys accept this one's session tickets, and the other way round.
func (s *Server) ShareTickets(config *tls.Config) {
	var keys [][32]byte
	for _, key := range s.tokenKeys {
		keys = append(keys, derive(key, "quiclb quic-go ticket"))
	}
	if len(keys) > 0 {
		config.SetSessionTicketKeys(keys)
	}
}

// ErrResetKey is what Reload returns if everything is in force except the reset key.
var ErrResetKey = errors.New("reset-key-file: another key than before: quic-go keeps the one it began with, so that " +
	"balancers cannot reset connections with new CIDs until this server is restarted")

// Reload reads the file again; new connection IDs are by it from then on. If it fails, other than with ErrResetKey,
// nothing has changed.
func (s *Server) Reload() error {
	config, err := LoadServerConfig(s.path)
	if err != nil {
		return err
	}
	s.mutex.Lock()
	defer s.mutex.Unlock()
	if err := s.obstacle(config); err != nil {
		return err
	}
	if err := s.generator.Switch(config); err != nil {
		return err
	}
	if s.config.CID != nil && !sameCID(s.config, config) {
		s.left = append(s.left, s.config)
	}
	s.config = config
	if s.resetKey != nil && !bytes.Equal(s.resetKey[:], config.ResetKey) || s.resetKey == nil && config.ResetKey != nil {
		return ErrResetKey
	}
	return nil
}

// obstacle is why a running server does not take a configuration, although there is no mistake in it.
func (s *Server) obstacle(config *ServerConfig) error {
	now := s.config
	switch {
	case config.Made != "" && config.Made < now.Made:
		return fmt.Errorf("made: %s: older than the configuration in force, of %s", config.Made, now.Made)
	case config.CID == nil && now.CID != nil:
		return errors.New("cid-config: missing: there is one in force, and to be without takes a restart")
	case config.ResetKey == nil && now.ResetKey != nil:
		return errors.New("reset-key-file: missing: there is one in force, and to be without takes a restart")
	case config.Made == "" && !sameCID(config, now):
		for _, left := range s.left {
			if sameCID(config, left) {
				return errors.New("cid-config: this process has left it for another already: expected a file that says when " +
					"it was made")
			}
		}
	}
	return nil
}

// sameCID says whether two servers make the same connection IDs.
func sameCID(one, other *ServerConfig) bool {
	if one.CID == nil || other.CID == nil {
		return one.CID == other.CID
	}
	return reflect.DeepEqual(*one.CID, *other.CID) && bytes.Equal(one.ServerID, other.ServerID)
}

// Close lets another process have the nonce file.
func (s *Server) Close() error {
	return s.generator.Close()
}
