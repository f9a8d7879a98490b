// server is a small HTTP/3 server that a QUIC-LB balancer can route to, made of quic-go and package quiclb.
package main

import (
	"context"
	"crypto/tls"
	"errors"
	"flag"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"

	"quiclb"
)

const grace = 500 * time.Millisecond // for requests that are being answered when the server ends

type options struct {
	listen                                []string
	config, cert, key, name, tokenKeyFile string
	retry                                 bool
	idle                                  float64
}

func main() {
	var o options
	flag.Func("listen", "`IP:PORT` to listen at; may be given twice, for IPv4 and IPv6", func(address string) error {
		o.listen = append(o.listen, address)
		return nil
	})
	flag.StringVar(&o.config, "server-config", "", "the `FILE` that quiclb server-config wrote")
	flag.StringVar(&o.cert, "cert", "", "`PEM` file with the certificate chain")
	flag.StringVar(&o.key, "key", "", "`PEM` file with its private key")
	flag.StringVar(&o.name, "name", "", "`NAME` in what the server answers; by default that of the file")
	flag.StringVar(&o.tokenKeyFile, "token-key-file", "", "`FILE` of the fleet's keys for tokens and session tickets")
	flag.BoolVar(&o.retry, "retry", false, "have every client prove its address by a Retry")
	flag.Float64Var(&o.idle, "idle-timeout", 30, "`SECONDS` after which a silent connection is given up")
	flag.Parse()
	if flag.NArg() > 0 || len(o.listen) == 0 || o.config == "" || o.cert == "" || o.key == "" || o.idle <= 0 {
		fmt.Fprintln(os.Stderr, "server: expected --listen IP:PORT, --server-config FILE, --cert PEM and --key PEM")
		os.Exit(2)
	}
	if err := run(o); err != nil {
		complain(o.name, err)
		os.Exit(2)
	}
}

func complain(name string, err error) {
	if name == "" {
		name = "server"
	}
	for _, line := range strings.Split(err.Error(), "\n") {
		fmt.Fprintf(os.Stderr, "%s: %s\n", name, line)
	}
}

func run(o options) error {
	server, err := quiclb.Load(o.config, o.tokenKeyFile)
	if err != nil {
		return err
	}
	defer server.Close()
	if o.name == "" {
		o.name = server.Config().Name
	}
	certificate, err := tls.LoadX509KeyPair(o.cert, o.key)
	if err != nil {
		return err
	}
	tlsConfig := http3.ConfigureTLSConfig(&tls.Config{Certificates: []tls.Certificate{certificate}})
	server.ShareTickets(tlsConfig)

	var stopping atomic.Bool
	site := &http3.Server{Handler: handler(o.name, server)}
	failed := make(chan error, len(o.listen))
	ready := "ready"
	var transports []*quic.Transport
	for _, address := range o.listen {
		udp, err := net.ResolveUDPAddr("udp", address)
		if err != nil {
			return fmt.Errorf("--listen: %w", err)
		}
		socket, err := net.ListenUDP("udp", udp)
		if err != nil {
			return fmt.Errorf("--listen: %w", err)
		}
		transport := server.Transport(socket)
		transport.VerifySourceAddress = func(net.Addr) bool { return o.retry }
		listener, err := transport.ListenEarly(tlsConfig, &quic.Config{
			Allow0RTT:      true, // for requests that change nothing, see handler
			MaxIdleTimeout: time.Duration(o.idle * float64(time.Second)),
		})
		if err != nil {
			return err
		}
		transports = append(transports, transport)
		ready += " " + socket.LocalAddr().String()
		go func() {
			if err := site.ServeListener(listener); !stopping.Load() {
				failed <- err
			}
		}()
	}
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGHUP, syscall.SIGTERM, syscall.SIGINT)
	fmt.Println(ready)
	for {
		select {
		case err := <-failed:
			return err
		case got := <-signals:
			if got == syscall.SIGHUP {
				reload(o.name, server)
				continue
			}
		}
		stopping.Store(true)
		ctx, cancel := context.WithTimeout(context.Background(), grace)
		defer cancel()
		if site.Shutdown(ctx) != nil { // GOAWAY, then the connections that are still there
			_ = site.Close()
		}
		for _, transport := range transports {
			_ = transport.Close()
		}
		return nil
	}
}

func reload(name string, server *quiclb.Server) {
	switch err := server.Reload(); {
	case err == nil:
		complain(name, errors.New("new configuration in force"))
	case errors.Is(err, quiclb.ErrResetKey):
		complain(name, fmt.Errorf("new configuration in force, but for one key\n%w", err))
	default:
		complain(name, fmt.Errorf("the configuration in force stays\n%w", err))
	}
}

// handler serves what every server of quiclb's tests does.
func handler(name string, server *quiclb.Server) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /whoami", func(w http.ResponseWriter, r *http.Request) { whoami(w, r, name, server) })
	mux.HandleFunc("GET /bytes/{count}", octets)
	mux.HandleFunc("GET /slow/{seconds}", slow)
	mux.HandleFunc("GET /status/{code}", status)
	mux.HandleFunc("PUT /upload", upload)
	mux.HandleFunc("POST /upload", upload)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		// Whoever sees 0-RTT packets can send them again: requests that change something wait for the handshake.
		if !r.TLS.HandshakeComplete && r.Method != http.MethodGet && r.Method != http.MethodHead {
			http.Error(w, "not in early data", http.StatusTooEarly)
			return
		}
		mux.ServeHTTP(w, r)
	})
}
