"""What is expected of a server, and whether what was seen is that: functions of observations, without any I/O.

Requirements are those of draft-ietf-quic-load-balancers, and of RFC 9000 where that is named. docs/conformance.md has
a line for each check.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import islice

from lb.cid import LENGTH_BITS
from lb.conformance import randomness
from lb.conformance.observed import Kind, MoveRecord, Observations, Origin, RotationRecord, SeenCid, Trigger
from lb.conformance.stale import is_stale
from lb.conformance.subject import Subject
from lb.reset import MIN_RESET, SHORT_HEADER_FORM, TOKEN_LENGTH

# Ours.
MOST_EVIDENCE = 5  # CIDs that are shown with a failure
MOST_LOST = 0.01  # of handshakes, that is: packets get lost
FORM_BITS = 0b1100_0000
MUST_ANSWER = 100  # octets of a trigger that is large enough for any reset
FEW = 30  # values that say nothing about chance


class Status(StrEnum):
    """What became of a check."""

    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check found: why it failed or was skipped, or what it looked at."""

    status: Status
    detail: str
    evidence: tuple[str, ...] = ()
    numbers: Mapping[str, int | float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Check:
    """A name that stays the same for programs, a sentence for people, and who says what became of it."""

    name: str
    title: str
    judge: Callable[[Subject, Observations], Finding]


def passed(detail: str, **numbers: float) -> Finding:
    return Finding(Status.PASSED, detail, numbers=numbers)


def failed(detail: str, evidence: Iterable[str] = (), /, **numbers: float) -> Finding:
    return Finding(Status.FAILED, detail, tuple(islice(evidence, MOST_EVIDENCE)), numbers)


def skipped(reason: str) -> Finding:
    return Finding(Status.SKIPPED, reason)


def handshake(subject: Subject, seen: Observations) -> Finding:
    numbers = {"handshakes": seen.handshakes, "unanswered": seen.unanswered}
    if seen.unanswered > max(1, MOST_LOST * seen.handshakes):
        return failed(f"{seen.unanswered} of {seen.handshakes + seen.unanswered} were not answered in time", **numbers)
    milliseconds = 1000 * (seen.connect_seconds or 0.0)
    detail = f"{seen.handshakes} handshakes, the first in {milliseconds:.0f} ms, ALPN {seen.alpn or 'none'}"
    return passed(detail, first_milliseconds=round(milliseconds, 1), **numbers)


def routable(subject: Subject, seen: Observations) -> Finding:
    cids = [each for each in seen.cids if each.origin is not Origin.RETRY]
    wrong = [(each, reason) for each in cids if (reason := subject.misrouted(each.cid)) is not None]
    numbers = {"cids": len(cids), "misrouted": len(wrong)}
    by_origin = Counter(each.origin for each in cids)
    counted = ", ".join(f"{count} {origin}" for origin, count in by_origin.items())
    if wrong:
        evidence = [f"{_shown(each)}: {reason}" for each, reason in wrong]
        detail = f"{len(wrong)} of {len(cids)} CIDs are not routable to this server"
        if stale := sum(is_stale(subject.config, subject.server_id, each.cid) for each, _ in wrong):
            detail += f"; {stale} were made by the cipher of drafts -15 to -18"
        return failed(detail, evidence, **numbers)
    return passed(f"{len(cids)} CIDs carry its config ID and server ID ({counted})", **numbers)


def cid_length(subject: Subject, seen: Observations) -> Finding:
    wanted = subject.config.cid_length
    lengths = Counter(len(each.cid) for each in seen.cids)
    if set(lengths) != {wanted}:
        found = ", ".join(f"{count} of {length}" for length, count in sorted(lengths.items()))
        wrong = [_shown(each) for each in seen.cids if len(each.cid) != wanted]
        return failed(f"expected {wanted} octets, found {found}", wrong)
    return passed(f"all {len(seen.cids)} of {wanted} octets", cids=len(seen.cids), octets=wanted)


def first_octet(subject: Subject, seen: Observations) -> Finding:
    """The five low bits: the length, or nothing (section 3.3)."""
    cids = [each for each in seen.cids if each.cid]
    bits = [each.cid[0] & LENGTH_BITS for each in cids]
    if subject.config.encodes_length:
        wrong = [each for each, low in zip(cids, bits, strict=True) if low != len(each.cid) - 1]
        if wrong:
            detail = f"the low bits of {len(wrong)} of {len(cids)} are not the length after the first octet"
            return failed(detail, [f"{_shown(each)}: {each.cid[0] & LENGTH_BITS}" for each in wrong])
        return passed(f"the low bits of all {len(cids)} are their length", cids=len(cids))
    if len(cids) < FEW:
        return skipped(f"{len(cids)} CIDs: too few to tell")
    if (found := randomness.uneven(bits, LENGTH_BITS + 1)) is not None:
        return failed(f"the low bits of {len(cids)} CIDs are not random: {found}", map(_shown, cids), cids=len(cids))
    return passed(f"the low bits of {len(cids)} CIDs show no pattern", cids=len(cids))


def cid_pattern(subject: Subject, seen: Observations) -> Finding:
    """Nobody without the key can tell two CIDs of a server from those of two (sections 5.4 and 9)."""
    what = "octets" if subject.config.key is not None else "nonces"
    cids = [each for each in seen.cids if len(each.cid) == subject.config.cid_length]
    # A nonce that comes twice is another check's.
    tails = list({subject.block(each.cid): subject.tail(each.cid) for each in reversed(cids)}.values())[::-1]
    if len(tails) < FEW:
        return skipped(f"{len(tails)} different CIDs: too few to tell")
    if (found := randomness.pattern(tails)) is not None:
        return failed(f"the {what} of {len(tails)} CIDs are not random: {found}", map(_shown, cids), cids=len(tails))
    return passed(f"the {what} of {len(tails)} CIDs show no pattern", cids=len(tails))


def nonce_unique(subject: Subject, seen: Observations) -> Finding:
    """Section 9.6."""
    first: dict[bytes, SeenCid] = {}
    repeated: list[str] = []
    for each in seen.cids:
        block = subject.block(each.cid)
        if (before := first.setdefault(block, each)) is not each:
            when = ", after a restart" if each.after_restart and not before.after_restart else ""
            where = f"connections {before.connection} and {each.connection}"
            repeated.append(f"{each.cid.hex()}: {where}{when}")
    total = len(seen.cids)
    connections = len({each.connection for each in seen.cids})
    numbers = {"cids": total, "connections": connections, "repeated": len(repeated)}
    if repeated:
        return failed(f"{len(repeated)} of {total} nonces had been used before", repeated, **numbers)
    return passed(f"{total} nonces of {connections} connections, none twice", **numbers)


def nonce_start(subject: Subject, seen: Observations) -> Finding:
    """Section 9.6: a counter starts at a random value; section 9.7: so that nonces are hard to guess."""
    if subject.config.key is None:
        return skipped("plaintext: cid-pattern looks at the nonces themselves")
    own = [each for each in seen.cids if subject.misrouted(each.cid) is None]
    if not own:
        return skipped("no CID carries this server's ID")
    for after_restart in (False, True):
        first = next((each for each in own if each.after_restart is after_restart), None)
        decoded = subject.codec.decode(first.cid) if first else None
        if decoded is not None and randomness.near_zero(decoded.nonce, randomness.FALSE_ALARMS / 2):
            when = " after the restart" if after_restart else ""
            return failed(f"the first nonce{when} is near zero: {decoded.nonce.hex()}")
    return passed("nonces do not begin near zero")


def reset_tokens(subject: Subject, seen: Observations) -> Finding:
    """Those that the server gives are those that a balancer calculates (RFC 9000, section 10.3.2)."""
    if subject.token is None:
        return skipped(_NO_KEY)
    if seen.without_token:
        detail = "handshakes without a stateless_reset_token: nobody can reset these connections"
        return failed(f"{seen.without_token} {detail}")
    given = [each for each in seen.cids if each.token is not None and subject.misrouted(each.cid) is None]
    if not given:
        return skipped("no CID that carries this server's ID came with a token")
    wrong = [_shown(each) for each in given if each.token != subject.token(each.cid)]
    numbers = {"tokens": len(given), "wrong": len(wrong)}
    if wrong:
        return failed(f"{len(wrong)} of {len(given)} tokens do not follow from the reset key", wrong, **numbers)
    return passed(f"{len(given)} tokens follow from the reset key", **numbers)


def token_unique(subject: Subject, seen: Observations) -> Finding:
    """RFC 9000, section 10.3.2: whoever has the token of one CID must not be able to end another's connection."""
    cids: dict[bytes, set[str]] = {}
    for each in seen.cids:
        if each.token is not None:
            cids.setdefault(each.token, set()).add(each.cid.hex())
    if not cids:
        return skipped("no tokens were given")
    shared = [" and ".join(sorted(each)) for each in cids.values() if len(each) > 1]
    if shared:
        return failed(f"{len(shared)} of {len(cids)} tokens belong to more than one CID", shared)
    return passed(f"{len(cids)} tokens, none for two CIDs", tokens=len(cids))


def cid_limit(subject: Subject, seen: Observations) -> Finding:
    """RFC 9000, section 5.1.1."""
    if not seen.pools:
        return skipped(_NOT_SEEN)
    for pool in seen.pools:
        if pool.is_exceeded:
            return failed(f"a client that takes {pool.limit} CIDs was given more")
    most = ", ".join(f"{pool.most_active} of {pool.limit}" for pool in seen.pools)
    return passed(f"never more than clients take: {most}")


def cid_pool(subject: Subject, seen: Observations) -> Finding:
    """RFC 9000, section 5.1.1: a client has a CID to migrate with, and gets another for each that it retires."""
    if not seen.pools:
        return skipped(_NOT_SEEN)
    if _has_one_cid(subject, seen):
        return skipped(_ONE_CID)
    for pool in seen.pools:
        if pool.is_exceeded:
            continue  # cid-limit says so
        if not pool.issued:
            return failed(f"no NEW_CONNECTION_ID for a client that takes {pool.limit}: it cannot migrate")
        if pool.ran_out or pool.error is not None:
            detail = pool.error or "none was left"
            return failed(f"a client that takes {pool.limit} retired {pool.retired} CIDs: {detail}")
    retired = sum(pool.retired for pool in seen.pools)
    issued = ", ".join(f"{pool.issued} for a client that takes {pool.limit}" for pool in seen.pools)
    return passed(f"{retired} were retired and others came; issued {issued}", retired=retired)


def migration_allowed(subject: Subject, seen: Observations) -> Finding:
    if seen.disables_migration is None:
        return skipped(_NOT_SEEN)
    if seen.disables_migration:
        return failed("disable_active_migration is set: clients may not change their address")
    return passed("disable_active_migration is not set")


def nat_rebinding(subject: Subject, seen: Observations) -> Finding:
    return _moved(seen.rebinding, "after a change of port")


def active_migration(subject: Subject, seen: Observations) -> Finding:
    if seen.disables_migration:
        return skipped("disable_active_migration is set")
    move = seen.migration
    if move is not None and move.error is None and not move.took_new_cid:
        return skipped(_ONE_CID) if _has_one_cid(subject, seen) else failed("there was no spare CID to migrate with")
    return _moved(move, "after a change of port and CID")


def path_response(subject: Subject, seen: Observations) -> Finding:
    """RFC 9000, section 8.2.2."""
    if seen.disables_migration:
        return skipped("disable_active_migration is set")
    move = seen.migration
    if move is None or move.error is not None or not move.is_answered:
        return skipped("migration was not answered")
    if not move.is_challenge_answered:
        return failed("a PATH_CHALLENGE from a new port had no PATH_RESPONSE")
    return passed("answered a PATH_CHALLENGE from a new port")


def path_challenge(subject: Subject, seen: Observations) -> Finding:
    """RFC 9000, section 9.3."""
    moves = [move for move in (seen.rebinding, seen.migration) if move and move.error is None and move.is_answered]
    if not moves:
        return skipped("no move was answered")
    if not any(move.challenges for move in moves):
        return failed("new paths are not validated: the server sent no PATH_CHALLENGE")
    return passed(f"validates new paths: {sum(move.challenges for move in moves)} PATH_CHALLENGE frames")


def retry(subject: Subject, seen: Observations) -> Finding:
    """RFC 9000, section 17.2.5; what the client sends next has the Retry's SCID for a DCID."""
    if not seen.retries:
        return skipped("no Retry was sent")
    total = len(seen.retries)
    wrong = [(each.scid.hex(), r) for each in seen.retries if (r := subject.misrouted(each.scid)) is not None]
    if wrong:
        evidence = [f"{cid}: {reason}" for cid, reason in wrong]
        return failed(f"the SCIDs of {len(wrong)} of {total} Retry packets are not routable", evidence, retries=total)
    echoed = [each.scid.hex() for each in seen.retries if each.scid == each.answered_dcid]
    if echoed:
        return failed(f"{len(echoed)} of {total} Retry packets have the client's DCID for an SCID", echoed)
    return passed(f"the SCIDs of {total} Retry packets are routable", retries=total)


def reset(subject: Subject, seen: Observations) -> Finding:
    """A client of a connection that the server has lost is told (RFC 9000, section 10.3)."""
    if subject.token is None:
        return skipped(_NO_KEY)
    own = [each for each in seen.triggers if each.kind is Kind.OWN]
    return _resets(subject, own) if own else skipped(_NOT_SEEN)


def reset_size(subject: Subject, seen: Observations) -> Finding:
    """RFC 9000, sections 10.3 and 10.3.3: of at least 21 octets, shorter than what it answers, 0b01 in front."""
    triggers = [each for each in seen.triggers if each.kind is Kind.OWN]
    triggers += seen.restart.triggers if seen.restart else ()
    answered = [(each, answer) for each in triggers for answer in each.answers]
    if not answered:
        return skipped("there were no resets")
    wrong = [f"{len(answer)} octets to {each.size}" for each, answer in answered if len(answer) >= each.size]
    wrong += [f"{len(answer)} octets: too short" for _, answer in answered if len(answer) < MIN_RESET]
    wrong += [f"first octet {a[0]:08b}" for _, a in answered if a[0] & FORM_BITS != SHORT_HEADER_FORM]
    wrong += [f"{len(each.answers)} to one packet" for each in triggers if len(each.answers) > 1]
    if wrong:
        return failed(f"resets to packets of {_sizes(triggers)} octets are wrong", wrong)
    shortest = min(each.size for each, _ in answered)
    detail = f"{len(answered)} resets, all shorter than what they answered, to packets of {shortest} octets and more"
    return passed(detail, resets=len(answered), smallest_trigger=shortest)


def reset_foreign(subject: Subject, seen: Observations) -> Finding:
    """RFC 9000, section 21.11: who answers for another server's CIDs ends connections that are not its own."""
    others = [each for each in seen.triggers if each.kind in (Kind.FOREIGN, Kind.UNROUTABLE)]
    if not others:
        return skipped(_NOT_SEEN)
    answered = [f"{each.cid.hex()} ({each.kind})" for each in others if each.answers]
    if answered:
        return failed(f"{len(answered)} of {len(others)} packets to CIDs that are not its own had an answer", answered)
    return passed(f"{len(others)} packets to CIDs that are not its own had no answer", packets=len(others))


def reset_after_restart(subject: Subject, seen: Observations) -> Finding:
    """RFC 9000, section 10.3.2: the keys of tokens outlive the process."""
    record = seen.restart
    if record is None:
        return skipped("no --restart COMMAND")
    if record.error is not None:
        return failed(record.error)
    if subject.token is None:
        return skipped(_NO_KEY)
    if not record.triggers:
        return skipped("no CID of before the restart carries this server's ID")
    finding = _resets(subject, record.triggers)
    if finding.status is Status.FAILED:
        return finding
    return passed(f"{finding.detail}; up again after {record.seconds:.1f} s", seconds=round(record.seconds, 2))


def rotation(subject: Subject, seen: Observations) -> Finding:
    """Section 3.1: no new CIDs under the old configuration, and live connections move to the new one."""
    record = seen.rotation
    if record is None or subject.rotated is None:
        return skipped("no --rotate COMMAND")
    if record.error is not None:
        return failed(record.error)
    return _rotated(subject.rotated, record)


def rotation_old(subject: Subject, seen: Observations) -> Finding:
    """RFC 9000, section 5.1.2: what is to be retired is accepted until it is."""
    record = seen.rotation
    if record is None:
        return skipped("no --rotate COMMAND")
    if record.is_old_accepted is None:
        return skipped("no CID was to be retired")
    if not record.is_old_accepted:
        return failed("a CID that was to be retired was not accepted any more before it was")
    return passed("CIDs that were to be retired were accepted until they were")


def completed(subject: Subject, seen: Observations) -> Finding:
    if not seen.is_complete:
        return failed("the deadline came first: what was not looked at is neither right nor wrong")
    return passed("all was looked at")


CHECKS: Sequence[Check] = (
    Check("handshake", "connections can be made", handshake),
    Check("routable", "every CID carries this server's ID", routable),
    Check("cid-length", "all CIDs have the configured length", cid_length),
    Check("first-octet", "the low bits of the first octet are the length, or random", first_octet),
    Check("cid-pattern", "CIDs show no pattern", cid_pattern),
    Check("nonce-unique", "no nonce comes twice", nonce_unique),
    Check("nonce-start", "nonces of an encrypted configuration begin at random", nonce_start),
    Check("reset-tokens", "reset tokens follow from the reset key", reset_tokens),
    Check("token-unique", "no reset token serves two CIDs", token_unique),
    Check("cid-limit", "active_connection_id_limit is honoured", cid_limit),
    Check("cid-pool", "CIDs that are retired are replaced", cid_pool),
    Check("retry", "Retry SCIDs are routable", retry),
    Check("migration-allowed", "disable_active_migration is not set", migration_allowed),
    Check("nat-rebinding", "a client may change its port", nat_rebinding),
    Check("active-migration", "a client may migrate to another CID", active_migration),
    Check("path-challenge", "new paths are validated", path_challenge),
    Check("path-response", "clients can validate new paths", path_response),
    Check("reset", "unknown CIDs of this server get a Stateless Reset", reset),
    Check("reset-size", "Stateless Resets have the right size and form", reset_size),
    Check("reset-foreign", "CIDs of other servers get none", reset_foreign),
    Check("reset-after-restart", "a restarted server resets old connections", reset_after_restart),
    Check("rotation", "a new configuration is obeyed by new and live connections", rotation),
    Check("rotation-old", "CIDs of the old configuration are accepted until retired", rotation_old),
    Check("completed", "the examination was done within the deadline", completed),
)

_NO_KEY = "no reset-key-file in the server's file: its tokens cannot be known"
_ONE_CID = "plaintext, and the server issues one CID for each connection, as section 9 of the draft says"
_NOT_SEEN = "not looked at"


def _moved(move: MoveRecord | None, when: str) -> Finding:
    if move is None:
        return skipped(_NOT_SEEN)
    if move.error is not None:
        return failed(move.error)
    if not move.is_answered:
        return failed(f"no answer {when}")
    return passed(f"answered {when}")


def _resets(subject: Subject, triggers: Sequence[Trigger]) -> Finding:
    """Whether those packets that are large enough had an answer that ends in the token of the CID."""
    assert subject.token is not None  # noqa: S101 - who calls has looked
    silent = [each for each in triggers if not each.answers and each.size >= MUST_ANSWER]
    wrong = [e for e in triggers for answer in e.answers if answer[-TOKEN_LENGTH:] != subject.token(e.cid)]
    numbers = {"packets": len(triggers), "silent": len(silent), "wrong": len(wrong)}
    if wrong:
        evidence = [f"{each.cid.hex()}, {each.size} octets" for each in wrong]
        return failed(f"{len(wrong)} answers do not end in the token of the CID", evidence, **numbers)
    if silent:
        evidence = [f"{each.cid.hex()}, {each.size} octets" for each in silent]
        large = sum(each.size >= MUST_ANSWER for each in triggers)
        return failed(f"{len(silent)} of {large} packets had no answer", evidence, **numbers)
    resets = sum(len(each.answers) for each in triggers)
    return passed(f"{resets} resets with the right token to packets of {_sizes(triggers)} octets", **numbers)


def _rotated(after: Subject, record: RotationRecord) -> Finding:
    wrong = []
    slowest = 0.0
    for live in record.live:
        stale = [reason for cid in live.active if (reason := after.misrouted(cid)) is not None]
        if live.error is not None:
            wrong.append(f"a live connection: {live.error}")
        elif stale:
            wrong.append(f"a live connection has {len(stale)} CIDs of {len(live.active)} that are not new: {stale[0]}")
        elif live.moved_after is None or live.retire_prior_to < live.old:
            wrong.append(f"Retire Prior To {live.retire_prior_to}: expected {live.old} at least")
        else:
            slowest = max(slowest, live.moved_after)
    stale = [reason for each in record.later if (reason := after.misrouted(each.cid)) is not None]
    if stale:
        wrong.append(f"{len(stale)} of {len(record.later)} CIDs issued later are not under the new one: {stale[0]}")
    if after.token is not None:
        tokens = [each for each in record.later if each.token is not None and after.misrouted(each.cid) is None]
        if any(each.token != after.token(each.cid) for each in tokens):
            wrong.append("tokens of new CIDs do not follow from the new reset key")
    if wrong:
        return failed(f"not obeyed within {record.within:g} s", wrong)
    detail = (
        f"{len(record.live)} live connections have new CIDs after {slowest:.2f} s, and {len(record.later)} later ones"
    )
    return passed(detail, live=len(record.live), seconds=round(slowest, 3), later=len(record.later))


def _has_one_cid(subject: Subject, seen: Observations) -> bool:
    """Section 9: a plaintext configuration need not pretend that clients could hide by changing CIDs."""
    return subject.config.key is None and not any(pool.issued for pool in seen.pools)


def _shown(each: SeenCid) -> str:
    return f"{each.cid.hex() or 'none'} ({each.origin} of connection {each.connection})"


def _sizes(triggers: Sequence[Trigger]) -> str:
    sizes = sorted({each.size for each in triggers})
    return f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
