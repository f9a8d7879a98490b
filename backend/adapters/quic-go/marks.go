package quiclb

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math/big"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
)

const (
	marksFormat = "quiclb nonce marks 1"
	maxMarks    = 16 << 20 // octets
)

// A mark says how far a counter may have come: nonces start to start+reserved-1 are spent.
type mark struct {
	start, reserved *big.Int
	permutationKey  []byte // hides the counter of a plaintext configuration; empty for encrypted ones
}

// marksFile keeps marks in the file that quiclb's own generator uses (lb/highwater.py), one process at a time.
// Not safe for use by several goroutines at once.
type marksFile struct {
	path  string
	lock  *os.File
	marks map[string]mark
}

// openMarks fails if another process has the file, if others may read it, or if it is damaged: what is lost cannot be
// guessed. No file is a fresh start.
func openMarks(path string) (*marksFile, error) {
	// The file's own inode changes with every write, so the lock is on one that stays.
	lock, err := os.OpenFile(path+".lock", os.O_RDWR|os.O_CREATE|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, unreadable(path+".lock", err)
	}
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		lock.Close()
		if errors.Is(err, syscall.EWOULDBLOCK) {
			err = errors.New("in use by another process; every process needs a nonce file and server IDs of its own")
		}
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	marks, err := readMarks(path)
	if err != nil {
		lock.Close()
		return nil, err
	}
	return &marksFile{path: path, lock: lock, marks: marks}, nil
}

func (m *marksFile) close() error {
	return m.lock.Close()
}

// save is durable when it returns nil.
func (m *marksFile) save(identity string, mark mark) error {
	marks := maps.Clone(m.marks)
	marks[identity] = mark
	if err := m.write(dumpMarks(marks)); err != nil {
		return err
	}
	m.marks = marks
	return nil
}

func (m *marksFile) write(content []byte) error {
	temporary := m.path + ".new"
	file, err := os.OpenFile(temporary, os.O_WRONLY|os.O_CREATE|os.O_TRUNC|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	_, err = file.Write(content)
	if err = errors.Join(err, file.Chmod(0o600), file.Sync(), file.Close()); err != nil {
		return err
	}
	if err := os.Rename(temporary, m.path); err != nil {
		return err
	}
	directory, err := os.Open(filepath.Dir(m.path))
	if err != nil {
		return err
	}
	return errors.Join(directory.Sync(), directory.Close())
}

func readMarks(path string) (map[string]mark, error) {
	file, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return map[string]mark{}, nil
	}
	if err != nil {
		return nil, unreadable(path, err)
	}
	defer file.Close()
	status, err := file.Stat()
	if err != nil {
		return nil, unreadable(path, err)
	}
	if !status.Mode().IsRegular() {
		return nil, fmt.Errorf("%s: expected a regular file", path)
	}
	if mode := status.Mode().Perm(); mode&0o077 != 0 {
		return nil, fmt.Errorf("%s: mode %04o, expected 0600; it holds secrets", path, mode)
	}
	content, err := readFile(path, maxMarks)
	if err != nil {
		return nil, err
	}
	marks, err := parseMarks(content)
	if err != nil { // not shown: it may quote a key
		return nil, fmt.Errorf("%s: damaged, so that it no longer says which nonces are spent. Restore the newest copy of "+
			"it, or give this server new server IDs (or new keys) and then delete it", path)
	}
	return marks, nil
}

func parseMarks(content []byte) (map[string]mark, error) {
	var document struct {
		Format string `json:"format"`
		SHA256 string `json:"sha256"`
		Marks  map[string]struct {
			Start          *big.Int `json:"start"`
			Reserved       *big.Int `json:"reserved"`
			PermutationKey string   `json:"permutation_key"`
		} `json:"marks"`
	}
	decoder := json.NewDecoder(bytes.NewReader(content))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(&document); err != nil {
		return nil, err
	}
	marks := map[string]mark{}
	for identity, fields := range document.Marks {
		key, err := hex.DecodeString(fields.PermutationKey)
		if err != nil || fields.Start == nil || fields.Reserved == nil {
			return nil, errors.New("a mark without its parts")
		}
		marks[identity] = mark{fields.Start, fields.Reserved, key}
	}
	if document.Format != marksFormat || document.SHA256 != digest(marks) {
		return nil, errors.New("another format, or damaged")
	}
	return marks, nil
}

func dumpMarks(marks map[string]mark) []byte {
	return fmt.Appendf(nil, "{\n \"format\": %q,\n \"sha256\": %q,\n \"marks\": %s\n}\n",
		marksFormat, digest(marks), marksTable(marks, ": ", ",\n "))
}

func digest(marks map[string]mark) string {
	sum := sha256.Sum256([]byte(marksTable(marks, ":", ",")))
	return hex.EncodeToString(sum[:])
}

// marksTable is marks as JSON, sorted. The digest is of the form without spaces.
func marksTable(marks map[string]mark, colon, comma string) string {
	var entries []string
	for _, identity := range slices.Sorted(maps.Keys(marks)) {
		mark := marks[identity]
		fields := []string{
			fmt.Sprintf(`"permutation_key"%s"%x"`, colon, mark.permutationKey),
			fmt.Sprintf(`"reserved"%s%d`, colon, mark.reserved),
			fmt.Sprintf(`"start"%s%d`, colon, mark.start),
		}
		entries = append(entries, fmt.Sprintf("%q%s{%s}", identity, colon, strings.Join(fields, comma)))
	}
	return "{" + strings.Join(entries, comma) + "}"
}
