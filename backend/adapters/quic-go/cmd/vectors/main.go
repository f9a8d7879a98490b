// vectors computes what tests/data/adapter-vectors.json asks for, so that a test can compare. JSON in, JSON out.
package main

import (
	"encoding/hex"
	"encoding/json"
	"log"
	"os"

	"quiclb"
)

type octets []byte

func (o octets) MarshalText() ([]byte, error) {
	return []byte(hex.EncodeToString(o)), nil
}

func (o *octets) UnmarshalText(text []byte) (err error) {
	*o, err = hex.DecodeString(string(text))
	return err
}

type vectors struct {
	CIDs []struct {
		ConfigID      uint8   `json:"config_id"`
		Key           *octets `json:"key"`
		ServerID      octets  `json:"server_id"`
		Nonce         octets  `json:"nonce"`
		EncodesLength bool    `json:"encodes_length"`
		LowBits       byte    `json:"low_bits"`
		Appended      octets  `json:"appended"`
		CID           octets  `json:"cid"`
	} `json:"cids"`
	Tokens []struct {
		Key   octets `json:"key"`
		CID   octets `json:"cid"`
		Token octets `json:"token"`
	} `json:"tokens"`
	Identities []struct {
		ConfigID    uint8   `json:"config_id"`
		Key         *octets `json:"key"`
		ServerID    octets  `json:"server_id"`
		NonceLength int     `json:"nonce_length"`
		Identity    string  `json:"identity"`
	} `json:"identities"`
	Permutations []struct {
		Key     octets `json:"key"`
		Counter octets `json:"counter"`
		Nonce   octets `json:"nonce"`
	} `json:"permutations"`
}

func main() {
	log.SetFlags(0)
	log.SetPrefix("vectors: ")
	var all vectors
	if err := json.NewDecoder(os.Stdin).Decode(&all); err != nil {
		log.Fatal(err)
	}
	for i := range all.CIDs {
		v := &all.CIDs[i]
		config := quiclb.CIDConfig{ConfigID: v.ConfigID, ServerIDLength: len(v.ServerID), NonceLength: len(v.Nonce),
			EncodesLength: v.EncodesLength, AppendedLength: len(v.Appended)}
		if v.Key != nil {
			config.Key = *v.Key
		}
		codec, err := quiclb.NewCodec(config)
		if err != nil {
			log.Fatal(err)
		}
		cid, err := codec.Encode(v.ServerID, v.Nonce, v.LowBits, v.Appended)
		if err != nil {
			log.Fatal(err)
		}
		serverID, nonce, _ := codec.Decode(v.CID)
		v.CID, v.ServerID, v.Nonce = cid, serverID, nonce
	}
	for i := range all.Tokens {
		all.Tokens[i].Token = quiclb.ResetToken(all.Tokens[i].Key, all.Tokens[i].CID)
	}
	for i := range all.Identities {
		v := &all.Identities[i]
		config := quiclb.CIDConfig{ConfigID: v.ConfigID, ServerIDLength: len(v.ServerID), NonceLength: v.NonceLength}
		if v.Key != nil {
			config.Key = *v.Key
		}
		v.Identity = quiclb.Identity(config, v.ServerID)
	}
	for i := range all.Permutations {
		v := &all.Permutations[i]
		v.Nonce = quiclb.HideCounter(v.Key, v.Counter)
	}
	if err := json.NewEncoder(os.Stdout).Encode(all); err != nil {
		log.Fatal(err)
	}
}
