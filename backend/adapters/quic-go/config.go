package quiclb

import (
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"go.yaml.in/yaml/v3"
)

const (
	resetKeyLength = 32
	maxConfigFile  = 1 << 20 // octets
	madeFormat     = "2006-01-02T15:04:05Z"
)

// ServerConfig is what one server has to know: the file that `quiclb server-config` writes, and the key files it names.
// CID is nil for a server without a configuration, which issues unroutable CIDs.
type ServerConfig struct {
	Name      string
	CID       *CIDConfig
	ServerID  []byte
	ResetKey  []byte // 32 octets, this server ID's own; nil: no resets
	NonceFile string // which nonces are spent, across restarts; "": nowhere
	Made      string // when the file was made, as in 2026-01-31T12:00:00Z; "": it does not say
}

// LoadServerConfig reads a server's file. The error lists every mistake, one in each line.
func LoadServerConfig(path string) (*ServerConfig, error) {
	status, err := os.Stat(path)
	if err != nil {
		return nil, unreadable(path, err)
	}
	if !status.Mode().IsRegular() {
		return nil, fmt.Errorf("%s: not a regular file", path)
	}
	content, err := readFile(path, maxConfigFile)
	if err != nil {
		return nil, err
	}
	if !utf8.Valid(content) {
		return nil, fmt.Errorf("%s: not UTF-8", path)
	}
	var document yaml.Node
	decoder := yaml.NewDecoder(strings.NewReader(string(content)))
	if err := decoder.Decode(&document); err != nil {
		return nil, fmt.Errorf("%s: not YAML, or nothing in it: %w", path, err)
	}
	if decoder.Decode(new(yaml.Node)) == nil {
		return nil, fmt.Errorf("%s: a second document after `---`: expected one", path)
	}
	if document.Content[0].Kind != yaml.MappingNode {
		return nil, fmt.Errorf("%s: expected a mapping of keys to values", path)
	}

	reading := &reading{directory: filepath.Dir(path)}
	config := reading.server(document.Content[0])
	if err := errors.Join(reading.mistakes...); err != nil {
		return nil, err
	}
	return config, nil
}

// reading is one file being read: where relative names start, and what was wrong so far.
type reading struct {
	directory string
	mistakes  []error
}

func (r *reading) mistake(path, format string, arguments ...any) {
	r.mistakes = append(r.mistakes, fmt.Errorf("%s: %s", path, fmt.Sprintf(format, arguments...)))
}

var (
	namePattern    = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$`)
	integerPattern = regexp.MustCompile(`^(0|[1-9][0-9]{0,8})$`)
	keyPattern     = regexp.MustCompile(`[0-9A-Fa-f]{32,}`)
)

func (r *reading) server(node *yaml.Node) *ServerConfig {
	config := &ServerConfig{}
	top := r.mapping(node, "", "name", "cid-config", "server-id", "reset-key-file", "nonce-file", "made")
	if name, ok := r.text(top, "name", true); ok {
		if !namePattern.MatchString(name) {
			r.mistake("name", "expected a name of up to 64 letters, digits, dots, hyphens and underscores")
		}
		config.Name = name
	}
	if id, ok := r.text(top, "server-id", false); ok {
		octets, err := hex.DecodeString(id)
		if err != nil || len(octets) < 1 || len(octets) > 15 {
			r.mistake("server-id", "%s: expected 1 to 15 octets, two hex digits each, in quotes", shown(id))
		}
		config.ServerID = octets
	}
	if section, ok := top["cid-config"]; ok {
		config.CID = r.cid(section)
		if _, given := top["server-id"]; !given {
			r.mistake("server-id", "missing: expected one, since there is a cid-config")
		} else if length := config.CID.ServerIDLength; len(r.mistakes) == 0 && len(config.ServerID) != length {
			r.mistake("server-id", "%x: %d octets, but cid-config.server-id-length is %d", config.ServerID, len(config.ServerID), length)
		}
	} else if _, given := top["server-id"]; given {
		r.mistake("server-id", "a server ID without a cid-config: expected both or neither")
	}
	config.ResetKey = r.key(top, "", "reset-key-file", resetKeyLength)
	if name, ok := r.file(top, "", "nonce-file"); ok {
		config.NonceFile = name
	}
	if made, ok := r.text(top, "made", false); ok {
		if _, err := time.Parse(madeFormat, made); err != nil {
			r.mistake("made", "%s: expected a time, as in \"2026-01-31T12:00:00Z\"", shown(made))
		}
		config.Made = made
	}
	return config
}

func (r *reading) cid(node *yaml.Node) *CIDConfig {
	const path = "cid-config."
	before := len(r.mistakes)
	keys := r.mapping(node, "cid-config", "config-id", "server-id-length", "nonce-length", "key-file", "encodes-length", "appended-length")
	config := &CIDConfig{
		ConfigID:       uint8(r.integer(keys, path, "config-id", 0, 6, nil)),
		ServerIDLength: r.integer(keys, path, "server-id-length", 1, 15, nil),
		NonceLength:    r.integer(keys, path, "nonce-length", 4, 18, nil),
		EncodesLength:  true,
	}
	none := 0
	config.AppendedLength = r.integer(keys, path, "appended-length", 0, 14, &none)
	if value, ok := keys["encodes-length"]; ok {
		if value.Kind != yaml.ScalarNode || value.Tag != "!!bool" || (value.Value != "true" && value.Value != "false") {
			r.mistake(path+"encodes-length", "expected true or false")
		}
		config.EncodesLength = value.Value == "true"
	}
	if len(r.mistakes) == before {
		if err := config.check(); err != nil {
			r.mistake("cid-config", "%s", err)
		}
	}
	config.Key = r.key(keys, path, "key-file", keyLength)
	return config
}

// mapping gives the values of a mapping by their keys; those that are not known are mistakes.
func (r *reading) mapping(node *yaml.Node, path string, known ...string) map[string]*yaml.Node {
	values := map[string]*yaml.Node{}
	if !r.plain(node, path) {
		return values
	}
	if node.Kind != yaml.MappingNode {
		r.mistake(path, "expected a mapping")
		return values
	}
	if path != "" {
		path += "."
	}
	for i := 0; i+1 < len(node.Content); i += 2 {
		name, value := node.Content[i].Value, node.Content[i+1]
		if node.Content[i].Kind != yaml.ScalarNode || !slices.Contains(known, name) {
			r.mistake(path+shown(name), "unknown key")
		} else if _, twice := values[name]; twice {
			r.mistake(path+name, "given twice, again in line %d: expected once", value.Line)
		} else {
			values[name] = value
		}
	}
	return values
}

// plain says whether a node is free of what YAML allows and a configuration has no use for.
func (r *reading) plain(node *yaml.Node, path string) bool {
	if node.Kind == yaml.AliasNode || node.Anchor != "" || node.Style&yaml.TaggedStyle != 0 {
		r.mistake(path, "aliases and tags are not used here; write the value out")
		return false
	}
	return true
}

// text is a value that YAML takes for one: what looks like a number or a date has to be quoted.
func (r *reading) text(values map[string]*yaml.Node, name string, required bool) (string, bool) {
	value, ok := values[name]
	if !ok {
		if required {
			r.mistake(name, "missing")
		}
		return "", false
	}
	if !r.plain(value, name) {
		return "", false
	}
	if value.Kind != yaml.ScalarNode || value.Tag != "!!str" {
		r.mistake(name, "expected a text; put numbers and the like in quotes")
		return "", false
	}
	return value.Value, true
}

func (r *reading) integer(values map[string]*yaml.Node, path, name string, low, high int, otherwise *int) int {
	value, ok := values[name]
	if !ok && otherwise != nil {
		return *otherwise
	}
	if !ok {
		r.mistake(path+name, "missing: expected an integer, %d to %d", low, high)
		return low
	}
	number, err := strconv.Atoi(value.Value)
	plain := value.Kind == yaml.ScalarNode && value.Tag == "!!int" && value.Style == 0 && integerPattern.MatchString(value.Value)
	if err != nil || !plain || number < low || number > high {
		r.mistake(path+name, "%s: expected an integer, %d to %d", shown(value.Value), low, high)
		return low
	}
	return number
}

func (r *reading) file(values map[string]*yaml.Node, path, name string) (string, bool) {
	text, ok := r.text(values, name, false)
	if !ok {
		return "", false
	}
	if len(text) == 0 || keyPattern.FindString(text) == text {
		r.mistake(path+name, "%s: expected the name of a file", shown(text))
		return "", false
	}
	if !filepath.IsAbs(text) {
		text = filepath.Join(r.directory, text)
	}
	return text, true
}

func (r *reading) key(values map[string]*yaml.Node, path, name string, length int) []byte {
	file, ok := r.file(values, path, name)
	if !ok {
		return nil
	}
	key, err := ReadKey(file, length)
	if err != nil {
		r.mistake(path+name, "%s", err)
	}
	return key
}

// shown is a text as an error quotes it: not too long, and without anything that looks like a key.
func shown(text string) string {
	text = keyPattern.ReplaceAllString(text, "<hex digits>")
	if len(text) > 60 {
		text = text[:57] + "..."
	}
	return strings.Trim(strconv.Quote(text), `"`)
}
