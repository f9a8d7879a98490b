package quiclb

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/ipv4"
)

var serverID = []byte{0xa1, 0xb2, 0xc3}

// place is a directory with the keys of two configurations, and the files of a server under them.
type place string

func newPlace(t *testing.T) place {
	p := place(t.TempDir())
	for id, digits := range []string{"11", "22"} {
		p.secret(t, fmt.Sprintf("cid-%d.key", id), strings.Repeat(digits, 16))
		p.secret(t, fmt.Sprintf("reset-%d.key", id), strings.Repeat(digits, 32))
	}
	return p
}

func (p place) secret(t *testing.T, name, digits string) {
	p.write(t, name, digits+"\n")
}

func (p place) write(t *testing.T, name, text string) string {
	t.Helper()
	path := filepath.Join(string(p), name)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func (p place) server(t *testing.T, configID int, more string) string {
	return p.write(t, "server.yaml", serverYAML(configID, more))
}

func serverYAML(configID int, more string) string {
	return fmt.Sprintf(`# made by hand
name: web
cid-config:
  config-id: %d
  server-id-length: 3
  nonce-length: 4
  key-file: cid-%[1]d.key
server-id: "a1b2c3"
reset-key-file: reset-%[1]d.key
%s`, configID, more)
}

func codec(t *testing.T, configID uint8) *Codec {
	key := bytes.Repeat([]byte{0x11 * (configID + 1)}, 16)
	c, err := NewCodec(CIDConfig{ConfigID: configID, ServerIDLength: 3, NonceLength: 4, Key: key, EncodesLength: true})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func load(t *testing.T, path string) *Server {
	t.Helper()
	server, err := Load(path, "")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { server.Close() })
	return server
}

func issue(t *testing.T, generator *Generator) []byte {
	t.Helper()
	cid, err := generator.GenerateConnectionID()
	if err != nil {
		t.Fatal(err)
	}
	return cid.Bytes()
}

func expect(t *testing.T, err error, reasons ...string) {
	t.Helper()
	for _, reason := range reasons {
		if err == nil || !strings.Contains(err.Error(), reason) {
			t.Errorf("%v: expected %q", err, reason)
		}
	}
}

func TestEveryConnectionIDHasTheServerIDAndANonceOfItsOwn(t *testing.T) {
	generator := load(t, newPlace(t).server(t, 0, "")).Generator()
	issued := make([][]byte, 2000)
	var group sync.WaitGroup
	for first := range 4 {
		group.Go(func() {
			for i := first; i < len(issued); i += 4 {
				issued[i] = issue(t, generator)
			}
		})
	}
	group.Wait()
	nonces := map[string]bool{}
	for _, cid := range issued {
		id, nonce, ok := codec(t, 0).Decode(cid)
		if !ok || !bytes.Equal(id, serverID) || len(cid) != 8 || cid[0] != 7 {
			t.Fatalf("%x", cid)
		}
		nonces[string(nonce)] = true
	}
	if len(nonces) != len(issued) {
		t.Errorf("%d nonces in %d connection IDs", len(nonces), len(issued))
	}
}

func TestAReloadChangesConnectionIDsAndTellsOfAnotherResetKey(t *testing.T) {
	place := newPlace(t)
	server := load(t, place.server(t, 0, ""))
	place.server(t, 1, "")
	if err := server.Reload(); !errors.Is(err, ErrResetKey) {
		t.Errorf("%v: expected ErrResetKey", err)
	}
	if id, _, ok := codec(t, 1).Decode(issue(t, server.Generator())); !ok || !bytes.Equal(id, serverID) {
		t.Error("not of the new configuration")
	}
	place.server(t, 0, "")
	expect(t, server.Reload(), "cid-config: this process has left it")
	place.server(t, 0, `made: "2026-02-01T00:00:00Z"`)
	if err := server.Reload(); err != nil {
		t.Error(err)
	}
}

func TestAMistakenOrStaleFileChangesNothing(t *testing.T) {
	place := newPlace(t)
	server := load(t, place.server(t, 0, `made: "2026-02-01T00:00:00Z"`))
	for more, reason := range map[string]string{
		"colour: red":                  "colour: unknown key",
		"nonce-file: nonces":           "nonce-file: another one",
		`made: "2026-01-31T23:59:59Z"`: "made: 2026-01-31T23:59:59Z: older",
	} {
		place.server(t, 1, more)
		expect(t, server.Reload(), reason)
		if cid := issue(t, server.Generator()); cid[0]>>5 != 0 {
			t.Errorf("%s: %x", more, cid)
		}
	}
}

func TestARunningServerLosesNeitherItsConfigurationNorItsResetKey(t *testing.T) {
	place := newPlace(t)
	server := load(t, place.server(t, 0, ""))
	place.write(t, "server.yaml", "name: web\n")
	expect(t, server.Reload(), "cid-config: missing")
	place.write(t, "server.yaml", strings.Replace(serverYAML(0, ""), "reset-key-file: reset-0.key\n", "", 1))
	expect(t, server.Reload(), "reset-key-file: missing")
}

func TestAConnectionIDOfAnotherLengthTakesARestart(t *testing.T) {
	place := newPlace(t)
	server := load(t, place.server(t, 0, ""))
	place.write(t, "server.yaml", strings.Replace(serverYAML(0, ""), "nonce-length: 4", "nonce-length: 5", 1))
	expect(t, server.Reload(), "9 octets instead of 8")
}

func TestFilesAreRefusedWithEveryReason(t *testing.T) {
	place := newPlace(t)
	for _, wrong := range []struct {
		from, to string
		reasons  []string
	}{
		{"config-id: 0", "config-id: 7", []string{"cid-config.config-id: 7: expected an integer, 0 to 6"}},
		{"config-id: 0", "config-id: 00", []string{"cid-config.config-id: 00: expected"}},
		{"nonce-length: 4", "nonce-length: 17", []string{"cid-config: server ID and nonce take 20 octets"}},
		{`"a1b2c3"`, `"a1b2"`, []string{"server-id: a1b2: 2 octets, but"}},
		{`"a1b2c3"`, "101010", []string{"server-id: expected a text"}},
		{`"a1b2c3"`, "!!str a1b2c3", []string{"server-id: aliases and tags"}},
		{"name: web", "name: web\nname: bew", []string{"name: given twice"}},
		{"name: web", "names: web", []string{"names: unknown key", "name: missing"}},
		{"name: web", "name: [web]", []string{"name: expected a text"}},
		{"cid-0.key", `"11111111111111111111111111111111"`, []string{"cid-config.key-file: <hex digits>: expected the name"}},
		{"name: web", "name: [", []string{"not YAML"}},
		{"# made by hand", "---\n---", []string{"a second document"}},
	} {
		good := serverYAML(0, "")
		if !strings.Contains(good, wrong.from) {
			t.Fatal(wrong.from)
		}
		_, err := LoadServerConfig(place.write(t, "server.yaml", strings.Replace(good, wrong.from, wrong.to, 1)))
		expect(t, err, wrong.reasons...)
	}
	path := place.server(t, 0, "")
	if err := os.Chmod(filepath.Join(string(place), "reset-0.key"), 0o644); err != nil {
		t.Fatal(err)
	}
	_, err := LoadServerConfig(path)
	expect(t, err, "reset-0.key: mode 0644")
}

func TestTokenKeysAreOneToEightDifferentLines(t *testing.T) {
	place := newPlace(t)
	one, two := strings.Repeat("0a", 32), strings.Repeat("0b", 32)
	keys, err := ReadTokenKeys(place.write(t, "token.keys", one+"\n\n"+two+"\n"))
	if err != nil || len(keys) != 2 || hex.EncodeToString(keys[0]) != one {
		t.Errorf("%v", err)
	}
	for text, reason := range map[string]string{
		"":                      "holds 0 keys",
		one + "\n" + one + "\n": "one key twice",
		one[2:] + "\n":          "holds 62 characters",
		"zz" + one[2:]:          "something else than hex digits",
	} {
		_, err := ReadTokenKeys(place.write(t, "token.keys", text))
		expect(t, err, reason)
		if err != nil && strings.Contains(err.Error(), one[:20]) {
			t.Error("an error with a key in it")
		}
	}
}

func TestMarksOutliveTheProcessAndBelongToOneAtATime(t *testing.T) {
	place := newPlace(t)
	config, err := LoadServerConfig(place.server(t, 0, "nonce-file: nonces"))
	if err != nil {
		t.Fatal(err)
	}
	issued := map[string]bool{}
	for range 3 {
		generator, err := NewGenerator(config)
		if err != nil {
			t.Fatal(err)
		}
		_, err = NewGenerator(config)
		expect(t, err, "in use by another process")
		for range 100 {
			issued[string(issue(t, generator))] = true
		}
		generator.Close()
	}
	if len(issued) != 300 {
		t.Errorf("%d connection IDs of 300", len(issued))
	}
	text, err := os.ReadFile(config.NonceFile)
	if err != nil || !strings.Contains(string(text), fmt.Sprintf(`"reserved": %d`, 3*block)) {
		t.Errorf("%s %v", text, err)
	}
	place.write(t, "nonces", strings.Replace(string(text), `"reserved": 1`, `"reserved": 2`, 1))
	_, err = NewGenerator(config)
	expect(t, err, "damaged")
}

func TestNoncesThatAreUsedUpOrCannotBeReservedMakeUnroutableConnectionIDs(t *testing.T) {
	place := newPlace(t)
	generator := load(t, place.server(t, 0, "nonce-file: nonces")).Generator()
	obstacle := filepath.Join(string(place), "nonces.new") // nothing can be written in its place
	if err := os.Mkdir(obstacle, 0o700); err != nil {
		t.Fatal(err)
	}
	if cid := issue(t, generator); len(cid) != 8 || cid[0] != 0b1110_0111 {
		t.Errorf("%x", cid)
	}
	if err := os.Remove(obstacle); err != nil {
		t.Fatal(err)
	}
	routable := 0
	for range retryEvery {
		if issue(t, generator)[0] == 7 {
			routable++
		}
	}
	if routable != 2 { // it tries again with the 64th since it failed
		t.Errorf("%d of %d are routable", routable, retryEvery)
	}
	counter := generator.source.counter
	counter.used.Set(counter.space)
	cid := issue(t, generator)
	if origin, _ := generator.origin(cid); cid[0] != 0b1110_0111 || origin != possible {
		t.Errorf("%x, of origin %d", cid, origin)
	}
}

func TestOriginsOfConnectionIDs(t *testing.T) {
	for _, more := range []string{"", "nonce-file: nonces"} {
		place := newPlace(t)
		before := issue(t, load(t, place.server(t, 0, "")).Generator())
		generator := load(t, place.server(t, 0, more)).Generator()
		c := codec(t, 0)
		foreignCID, _ := c.Encode([]byte{0xa1, 0xb2, 0xc4}, []byte{1, 2, 3, 4}, 0, nil)
		otherConfig, _ := codec(t, 1).Encode(serverID, []byte{1, 2, 3, 4}, 0, nil)
		for _, test := range []struct {
			cid  []byte
			want origin
		}{
			{issue(t, generator), possible},
			{before, forgotten},
			{foreignCID, foreign},
			{otherConfig, foreign},
			{[]byte{0xe7, 1, 2, 3, 4, 5, 6, 7}, foreign},
		} {
			if got, key := generator.origin(test.cid); got != test.want || (key != nil) != (got == forgotten) {
				t.Errorf("%x: origin %d, expected %d", test.cid, got, test.want)
			}
		}
	}
}

func TestConnectionIDsOfBeforeStayPossibleUnderAnotherServerID(t *testing.T) {
	place := newPlace(t)
	server := load(t, place.server(t, 0, ""))
	before := issue(t, server.Generator())
	other := strings.Replace(serverYAML(0, ""), "a1b2c3", "a1b2c4", 1)
	place.write(t, "server.yaml", other)
	if err := server.Reload(); err != nil {
		t.Fatal(err)
	}
	for _, cid := range [][]byte{before, issue(t, server.Generator())} {
		if origin, _ := server.Generator().origin(cid); origin != possible {
			t.Errorf("%x: origin %d", cid, origin)
		}
	}
}

func TestPlaintextNoncesAreHiddenAndFoundAgain(t *testing.T) {
	place := newPlace(t)
	text := strings.Replace(serverYAML(0, ""), "  key-file: cid-0.key\n", "", 1)
	generator := load(t, place.write(t, "server.yaml", text)).Generator()
	one, other := issue(t, generator), issue(t, generator)
	if !bytes.Equal(one[1:4], serverID) || bytes.Equal(one[4:7], other[4:7]) {
		t.Errorf("%x %x", one, other)
	}
	if got, _ := generator.origin(one); got != possible {
		t.Errorf("origin %d of its own", got)
	}
	other[7] ^= 1
	if got, _ := generator.origin(other); got != forgotten {
		t.Errorf("origin %d of one that it never issued", got)
	}
}

func TestResetsAreShorterThanWhatTheyAnswer(t *testing.T) {
	key, cid := make([]byte, 32), []byte{7, 1, 2, 3}
	for trigger := range 1500 {
		reset := resetFor(key, cid, trigger)
		if (reset == nil) != (trigger <= minReset) {
			t.Errorf("%d octets answered by %d", trigger, len(reset))
		}
		if reset == nil {
			continue
		}
		if len(reset) >= trigger || len(reset) < minReset || len(reset) > maxReset || reset[0]>>6 != 1 ||
			trigger > oneShorterUpTo && len(reset) < inconspicuous || !bytes.HasSuffix(reset, ResetToken(key, cid)) {
			t.Errorf("%d octets answered by %x", trigger, reset)
		}
	}
}

func TestTheSocketHidesForeignPacketsAndAnswersForgottenOnes(t *testing.T) {
	place := newPlace(t)
	generator := load(t, place.server(t, 0, "")).Generator()
	socket, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer socket.Close()
	client, err := net.DialUDP("udp", nil, socket.LocalAddr().(*net.UDPAddr))
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	foreignCID, _ := codec(t, 0).Encode([]byte{0, 0, 0}, []byte{1, 2, 3, 4}, 0, nil)
	forgottenCID, _ := codec(t, 0).Encode(serverID, make([]byte, 4), 0, nil)
	if origin, _ := generator.origin(forgottenCID); origin != forgotten {
		t.Skip("one chance in 2^32")
	}
	conn := NewConn(socket, generator)
	deadline := time.Now().Add(10 * time.Second)
	for _, setDeadline := range []func(time.Time) error{socket.SetReadDeadline, client.SetReadDeadline} {
		if err := setDeadline(deadline); err != nil {
			t.Fatal(err)
		}
	}
	for _, test := range []struct {
		header byte
		cid    []byte
		passes bool
	}{{0x40, foreignCID, false}, {0x40, forgottenCID, false}, {0x40, issue(t, generator), true}, {0xc0, foreignCID, true}} {
		packet := append(append([]byte{test.header}, test.cid...), make([]byte, 24)...)
		if _, err := client.Write(packet); err != nil {
			t.Fatal(err)
		}
		messages := []ipv4.Message{{Buffers: [][]byte{make([]byte, 1500)}, OOB: make([]byte, 128)}}
		if count, err := conn.ReadBatch(messages, 0); count != 1 || err != nil {
			t.Fatal(count, err)
		}
		if (messages[0].N > 0) != test.passes {
			t.Errorf("%x: %d octets passed", packet, messages[0].N)
		}
	}
	answer := make([]byte, 1500)
	count, err := client.Read(answer)
	if want := ResetToken(bytes.Repeat([]byte{0x11}, 32), forgottenCID); err != nil || count != 32 || !bytes.HasSuffix(answer[:count], want) {
		t.Errorf("%x %v", answer[:count], err)
	}
}

func TestResetsAreLimited(t *testing.T) {
	var limit limiter
	now := time.Now()
	allowed := 0
	for range 10 * resetsAtOneMoment {
		if limit.allows(now) {
			allowed++
		}
	}
	if allowed != resetsAtOneMoment || limit.allows(now) || !limit.allows(now.Add(time.Second)) {
		t.Errorf("%d resets at one moment", allowed)
	}
}
