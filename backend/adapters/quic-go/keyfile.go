package quiclb

import (
	"bytes"
	"crypto/hkdf"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
)

const (
	maxKeyFile   = 4096 // octets
	maxTokenKeys = 8
	tokenKey     = 32
)

// ReadKey reads a file with a key of length octets as hex digits. No error repeats what is in it.
func ReadKey(path string, length int) ([]byte, error) {
	content, err := readSecret(path)
	if err != nil {
		return nil, err
	}
	return parseKey(path, bytes.TrimSpace(content), length)
}

// ReadTokenKeys reads a file with one to eight keys of 32 octets, one in each line as hex digits, the newest first.
func ReadTokenKeys(path string) ([][]byte, error) {
	content, err := readSecret(path)
	if err != nil {
		return nil, err
	}
	var keys [][]byte
	for line := range bytes.Lines(content) {
		digits := bytes.TrimSpace(line)
		if len(digits) == 0 {
			continue
		}
		key, err := parseKey(path, digits, tokenKey)
		if err != nil {
			return nil, err
		}
		for _, other := range keys {
			if bytes.Equal(key, other) {
				return nil, fmt.Errorf("%s: holds one key twice", path)
			}
		}
		keys = append(keys, key)
	}
	if len(keys) < 1 || len(keys) > maxTokenKeys {
		return nil, fmt.Errorf("%s: holds %d keys: expected 1 to %d", path, len(keys), maxTokenKeys)
	}
	return keys, nil
}

// derive makes a key for one purpose. key is uniformly random, so that HKDF's extract step has nothing to do.
func derive(key []byte, purpose string) [32]byte {
	derived, err := hkdf.Expand(sha256.New, key, purpose, 32)
	if err != nil {
		panic(err) // of lengths alone
	}
	return [32]byte(derived)
}

func parseKey(path string, digits []byte, length int) ([]byte, error) {
	if len(digits) != 2*length {
		return nil, fmt.Errorf("%s: holds %d characters: expected %d hex digits (%d octets)", path, len(digits), 2*length, length)
	}
	key := make([]byte, length)
	if _, err := hex.Decode(key, digits); err != nil {
		return nil, fmt.Errorf("%s: holds something else than hex digits: expected %d of them", path, 2*length)
	}
	return key, nil
}

// readSecret reads a small regular file that is nobody else's.
func readSecret(path string) ([]byte, error) {
	status, err := os.Stat(path)
	if err != nil {
		return nil, unreadable(path, err)
	}
	if !status.Mode().IsRegular() { // opening a pipe would wait for ever
		return nil, fmt.Errorf("%s: not a regular file: expected a file with hex digits", path)
	}
	if mode := status.Mode().Perm(); mode&0o007 != 0 {
		return nil, fmt.Errorf("%s: mode %04o lets everybody at it: expected 0600 or 0640", path, mode)
	}
	return readFile(path, maxKeyFile)
}

func readFile(path string, limit int64) ([]byte, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, unreadable(path, err)
	}
	defer file.Close()
	content, err := io.ReadAll(io.LimitReader(file, limit+1))
	if err != nil {
		return nil, unreadable(path, err)
	}
	if int64(len(content)) > limit {
		return nil, fmt.Errorf("%s: more than %d octets", path, limit)
	}
	return content, nil
}

func unreadable(path string, err error) error {
	var detail *fs.PathError
	if errors.As(err, &detail) {
		err = detail.Err
	}
	return fmt.Errorf("%s: cannot be read: %w", path, err)
}
