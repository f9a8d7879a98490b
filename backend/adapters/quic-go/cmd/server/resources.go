package main

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"net/http"
	"strconv"
	"time"

	"quiclb"
)

const (
	maxOctets  = 1 << 34
	maxSeconds = 3600
	tick       = 50 * time.Millisecond
)

var chunk = makeChunk()

func makeChunk() []byte {
	chunk := make([]byte, 1<<16)
	for i := range chunk {
		chunk[i] = byte(i)
	}
	return chunk
}

func whoami(w http.ResponseWriter, r *http.Request, name string, server *quiclb.Server) {
	asJSON(w, map[string]any{
		"name":      name,
		"server_id": hex.EncodeToString(server.Config().ServerID),
		"client":    r.RemoteAddr,
		"resumed":   r.TLS.DidResume,
		"early":     !r.TLS.HandshakeComplete,
	})
}

func octets(w http.ResponseWriter, r *http.Request) {
	count, err := strconv.ParseInt(r.PathValue("count"), 10, 64)
	if err != nil || count < 0 || count > maxOctets {
		http.Error(w, "expected a number of octets", http.StatusBadRequest)
		return
	}
	w.Header().Set("Content-Type", "application/octet-stream")
	w.Header().Set("Content-Length", strconv.FormatInt(count, 10))
	for ; count > 0; count -= int64(len(chunk)) {
		if _, err := w.Write(chunk[:min(count, int64(len(chunk)))]); err != nil {
			return
		}
	}
}

func slow(w http.ResponseWriter, r *http.Request) {
	seconds, err := strconv.ParseFloat(r.PathValue("seconds"), 64)
	if err != nil || !(seconds >= 0 && seconds <= maxSeconds) {
		http.Error(w, "expected a number of seconds", http.StatusBadRequest)
		return
	}
	ticker := time.NewTicker(tick)
	defer ticker.Stop()
	for line := range int(math.Round(seconds / tick.Seconds())) {
		fmt.Fprintln(w, line)
		w.(http.Flusher).Flush()
		select {
		case <-ticker.C:
		case <-r.Context().Done():
			return
		}
	}
	fmt.Fprintln(w, "end")
}

func status(w http.ResponseWriter, r *http.Request) {
	code, err := strconv.Atoi(r.PathValue("code"))
	if err != nil || code < 200 || code > 599 {
		http.Error(w, "expected a status code from 200 to 599", http.StatusBadRequest)
		return
	}
	w.WriteHeader(code)
}

func upload(w http.ResponseWriter, r *http.Request) {
	digest := sha256.New()
	count, err := io.Copy(digest, r.Body)
	if err != nil {
		return
	}
	asJSON(w, map[string]any{"octets": count, "sha256": hex.EncodeToString(digest.Sum(nil))})
}

func asJSON(w http.ResponseWriter, value any) {
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(value)
}
