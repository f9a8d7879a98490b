"""Writes the dashboards that are beside it: `python deploy/grafana/dashboards.py [DIRECTORY]`."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, statetimeline, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import (
    BigValueGraphMode,
    LegendDisplayMode,
    LegendPlacement,
    SortOrder,
    StackingMode,
    TooltipDisplayMode,
    VisibilityMode,
)
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DataSourceRef,
    FieldColorModeId,
    Threshold,
    ThresholdsMode,
    ValueMap,
    ValueMapping,
    ValueMappingResult,
    VariableOption,
    VariableRefresh,
    VariableSort,
)

SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
INSTANCE = 'job="quiclb", instance=~"$instance"'
SERVICE = f'{INSTANCE}, service=~"$service"'
WIDTH = 24  # columns of Grafana's grid
STAT_HEIGHT, HEIGHT = 4, 8

# Numbers of states and phases in the timelines, as words and colours.
STATES = {
    "active": "green",
    "draining": "blue",
    "down": "orange",
    "dead": "red",
    "fenced": "purple",
}
PHASES = {"free": "transparent", "prepared": "blue", "active": "green", "retiring": "orange"}


class Panel(NamedTuple):
    """One panel. `queries` are PromQL and the legend of its series; `words` the names and colours of 0, 1, 2, …"""

    title: str
    text: str
    queries: Sequence[tuple[str, str]]
    unit: str = "short"
    width: int = 12
    is_stacked: bool = False
    most: float | None = None
    words: Mapping[str, str] | None = None
    bad: str = ""  # a number: from 1 (or below 1) it is bad: "above", "below"


def numbered(metric: str, label: str, values: Sequence[str]) -> str:
    """An expression that is the place of the value whose series is 1."""
    one = (f'{n} * {metric}{{{SERVICE}, {label}="{value}"}}' for n, value in enumerate(values) if n)
    return f" + ignoring ({label}) ".join(one)


FLEET: Sequence[Panel | str] = (
    "Now",
    Panel("Balancers that answer", "Scrapes that succeed.", [(f"sum(up{{{INSTANCE}}})", "")], width=4),
    Panel(
        "Alerts",
        "Those of deploy/prometheus/rules.yml that fire.",
        [('count(ALERTS{alertname=~"Quiclb.+", alertstate="firing"}) or vector(0)', "")],
        width=4,
        bad="above",
    ),
    Panel(
        "Fewest active backends",
        "Of any service on any balancer. 0: its new connections have nowhere to go.",
        [(f"min(service:quiclb_backends_active:sum{{{SERVICE}}})", "")],
        width=4,
        bad="below",
    ),
    Panel(
        "Failing open",
        "Services whose health checks are not believed, because too many backends fail them.",
        [(f"sum(quiclb_fail_open{{{SERVICE}}})", "")],
        width=4,
        bad="above",
    ),
    Panel(
        "Files refused",
        "Balancers that refused the file when they last read it. An older one is in force there.",
        [(f"count(quiclb_config_last_reload_successful{{{INSTANCE}}} == 0) or vector(0)", "")],
        width=4,
        bad="above",
    ),
    Panel(
        "Rescued",
        "Connections in this time span that a 4-tuple balancer would have broken.",
        [(f"sum(increase(quiclb_rescued_total{{{SERVICE}}}[$__range]))", "")],
        width=4,
    ),
    "Traffic",
    Panel(
        "Datagrams from clients, by verdict",
        "What became of them.",
        [(f"sum by (verdict) (rate(quiclb_datagrams_total{{{SERVICE}}}[$__rate_interval])) > 0", "{{verdict}}")],
        "pps",
        is_stacked=True,
    ),
    Panel(
        "Datagrams to each backend",
        "",
        [
            (
                f'sum by (service, backend) (rate(quiclb_backend_datagrams_total{{{SERVICE}, direction="to"}}'
                "[$__rate_interval]))",
                "{{service}} {{backend}}",
            )
        ],
        "pps",
        is_stacked=True,
    ),
    Panel(
        "Bits to backends and from them",
        "UDP payload. Backends that answer directly (l2, ipip, gue) are not heard.",
        [
            (
                f"8 * sum by (direction) (rate(quiclb_backend_bytes_total{{{SERVICE}}}[$__rate_interval]))",
                "{{direction}}",
            )
        ],
        "bps",
    ),
    Panel(
        "Moves, and connections that a 4-tuple balancer would have broken",
        "Flows that began in the middle of a connection: clients that moved, or came from another balancer.",
        [
            (f"sum(rate(quiclb_moves_total{{{SERVICE}}}[$__rate_interval]))", "moves"),
            (f"sum(rate(quiclb_rescued_total{{{SERVICE}}}[$__rate_interval]))", "rescued"),
        ],
        "cps",
    ),
    "Backends",
    Panel(
        "States",
        "As each balancer sees them.",
        [(numbered("quiclb_backend_state", "state", list(STATES)), "{{instance}} {{service}} {{backend}}")],
        width=24,
        words=STATES,
    ),
    Panel(
        "Share of the ring",
        "The share of new connections that each backend gets. Balancers of one fleet should agree.",
        [(f"quiclb_backend_ring_share_ratio{{{SERVICE}}}", "{{instance}} {{service}} {{backend}}")],
        "percentunit",
    ),
    Panel(
        "Flows of each backend",
        "",
        [(f"sum by (service, backend) (quiclb_backend_flows{{{SERVICE}}})", "{{service}} {{backend}}")],
        is_stacked=True,
    ),
    Panel(
        "Weights, and what the operator said",
        "Effective weights: less during a slow start. Overrides stay until they are taken back.",
        [
            (f"quiclb_backend_weight{{{SERVICE}}}", "{{instance}} {{service}} {{backend}}"),
            (
                f"quiclb_backend_overridden{{{SERVICE}}} == 1",
                "{{instance}} {{service}} {{backend}}: {{key}} overridden",
            ),
        ],
    ),
    Panel(
        "Since the last datagram to a backend",
        "One that drains and has been quiet for long may go.",
        [
            (
                f"time() - quiclb_backend_last_datagram_timestamp_seconds{{{SERVICE}}}",
                "{{instance}} {{service}} {{backend}}",
            )
        ],
        "s",
    ),
    Panel(
        "Probes that were not answered",
        "",
        [
            (
                "sum by (service, backend, result) "
                f'(rate(quiclb_probes_total{{{SERVICE}, result!="answered"}}[$__rate_interval])) > 0',
                "{{service}} {{backend}} {{result}}",
            ),
            (
                "sum by (service, backend) "
                f"(rate(quiclb_backend_unreachable_total{{{SERVICE}}}[$__rate_interval])) > 0",
                "{{service}} {{backend}} ICMP error",
            ),
        ],
        "cps",
    ),
    Panel(
        "Round trip of probes",
        "",
        [(f"quiclb_probe_round_trip_seconds{{{SERVICE}}}", "{{instance}} {{service}} {{backend}}")],
        "s",
    ),
    Panel(
        "Resets",
        "On behalf of dead backends: in answer to a client, and unasked.",
        [
            (
                f"sum by (service, kind) (rate(quiclb_resets_total{{{SERVICE}}}[$__rate_interval]))",
                "{{service}} {{kind}}",
            )
        ],
        "pps",
    ),
    Panel(
        "Datagrams dropped",
        "By the router, by verdict, and by the network, by reason.",
        [
            (
                "sum by (verdict) (rate(quiclb_datagrams_total"
                f'{{{SERVICE}, verdict!~"cid|cid_down|table_.*|fallback|reset"}}[$__rate_interval])) > 0',
                "{{verdict}}",
            ),
            (f"sum by (reason) (rate(quiclb_send_failures_total{{{INSTANCE}}}[$__rate_interval])) > 0", "{{reason}}"),
        ],
        "pps",
    ),
    "The balancers themselves",
    Panel(
        "Flows and sockets, of what may be",
        "At the limit the idlest are given up for whoever comes.",
        [
            (f"instance:quiclb_flows:ratio{{{INSTANCE}}}", "{{instance}} flows"),
            (f"instance:quiclb_sockets:ratio{{{INSTANCE}}}", "{{instance}} sockets"),
            (f"instance:process_open_fds:ratio{{{INSTANCE}}}", "{{instance}} descriptors"),
        ],
        "percentunit",
        most=1,
    ),
    Panel(
        "Flows that began anew elsewhere, or ended",
        "",
        [
            (f"rate(quiclb_flows_evicted_total{{{INSTANCE}}}[$__rate_interval])", "{{instance}} evicted"),
            (f"rate(quiclb_flows_expired_total{{{INSTANCE}}}[$__rate_interval])", "{{instance}} expired"),
        ],
        "cps",
    ),
    Panel(
        "CPU",
        "Of the process that answers the scrape, without its workers.",
        [(f"rate(process_cpu_seconds_total{{{INSTANCE}}}[$__rate_interval])", "{{instance}}")],
        "percentunit",
    ),
    Panel(
        "Memory",
        "Of the process that answers the scrape, without its workers.",
        [(f"process_resident_memory_bytes{{{INSTANCE}}}", "{{instance}}")],
        "bytes",
    ),
    Panel(
        "Age of the configuration",
        "Since a file was last taken.",
        [(f"time() - quiclb_config_last_reload_success_timestamp_seconds{{{INSTANCE}}}", "{{instance}}")],
        "s",
    ),
    Panel(
        "What is running",
        "",
        [(f"count by (version, engine) (quiclb_build_info{{{INSTANCE}}})", "{{version}} {{engine}}")],
        is_stacked=True,
    ),
)

CONNECTION_IDS: Sequence[Panel | str] = (
    "Rotation",
    Panel(
        "Phases",
        "prepared: balancers decode it. active: servers issue it. retiring: until it is quiet. free: after the guard.",
        [
            (
                numbered("quiclb_config_id_phase", "phase", list(PHASES)) + " > 0",
                "{{instance}} {{service}} {{config_id}}",
            )
        ],
        width=24,
        words=PHASES,
    ),
    Panel(
        "Datagrams by config ID",
        "Routed by their connection ID. A rotation is over when the old one's are gone.",
        [
            (
                "sum by (service, config_id) "
                f"(rate(quiclb_config_id_datagrams_total{{{SERVICE}}}[$__rate_interval])) > 0",
                "{{service}} {{config_id}}",
            )
        ],
        "pps",
        is_stacked=True,
    ),
    Panel(
        "Since the last datagram",
        "A config ID that retires is free once this is longer than its guard.",
        [
            (
                f"time() - quiclb_config_id_last_datagram_timestamp_seconds{{{SERVICE}}}",
                "{{instance}} {{service}} {{config_id}}",
            )
        ],
        "s",
    ),
    Panel(
        "Age of keys",
        "Nonces are used up with their key.",
        [(f"time() - quiclb_cid_key_timestamp_seconds{{{SERVICE}}}", "{{instance}} {{service}} {{config_id}}")],
        "s",
    ),
    Panel(
        "Traffic that retires",
        "The share of a service's datagrams that is routed by config IDs that no server should issue any more.",
        [
            (
                f"sum by (instance, service) (service_config_id:quiclb_config_id_datagrams:rate5m{{{SERVICE}}} "
                f'and ignoring (phase) quiclb_config_id_phase{{{SERVICE}, phase="retiring"}} == 1) '
                f"/ sum by (instance, service) (service:quiclb_datagrams:rate5m{{{SERVICE}}} > 0)",
                "{{instance}} {{service}}",
            )
        ],
        "percentunit",
    ),
    "Connection IDs that say nothing",
    Panel(
        "Unroutable datagrams, by reason",
        "A client's first connection ID is random: a steady share is normal.",
        [
            (
                f"sum by (reason) (rate(quiclb_unroutable_datagrams_total{{{SERVICE}}}[$__rate_interval])) > 0",
                "{{reason}}",
            )
        ],
        "pps",
        is_stacked=True,
    ),
    Panel(
        "Unroutable share, and what would be a surge",
        "QuiclbUnroutableSurge fires above the second of each.",
        [
            (f"service:quiclb_unroutable_datagrams:ratio_rate5m{{{SERVICE}}}", "{{instance}} {{service}}"),
            (
                f"0.05 + 2 * service:quiclb_unroutable_datagrams:ratio_avg1d{{{SERVICE}}}",
                "{{instance}} {{service}} surge",
            ),
        ],
        "percentunit",
    ),
    Panel(
        "Who decided",
        "The connection ID, a table, or the hash of the 4-tuple.",
        [
            (
                f'sum(rate(quiclb_datagrams_total{{{SERVICE}, verdict=~"cid|cid_down|reset.*"}}[$__rate_interval]))',
                "connection ID",
            ),
            (f'sum(rate(quiclb_datagrams_total{{{SERVICE}, verdict=~"table_.*"}}[$__rate_interval]))', "table"),
            (f'sum(rate(quiclb_datagrams_total{{{SERVICE}, verdict="fallback"}}[$__rate_interval]))', "hash"),
        ],
        "pps",
        is_stacked=True,
    ),
    Panel(
        "Moves and rescued, by service",
        "",
        [
            (f"sum by (service) (rate(quiclb_moves_total{{{SERVICE}}}[$__rate_interval]))", "{{service}} moves"),
            (f"sum by (service) (rate(quiclb_rescued_total{{{SERVICE}}}[$__rate_interval]))", "{{service}} rescued"),
        ],
        "cps",
    ),
)

DASHBOARDS = {
    "fleet": ("quiclb: fleet", FLEET),
    "connection-ids": ("quiclb: connection IDs and rotation", CONNECTION_IDS),
}


def made(name: str) -> str:
    """One dashboard, as JSON."""
    title, contents = DASHBOARDS[name]
    builder = (
        dashboard.Dashboard(title)
        .uid(f"quiclb-{name}")
        .tags(["quiclb"])
        .time("now-1h", "now")
        .refresh("30s")
        .timezone("browser")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .with_variable(dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus"))
        .with_variable(choice("instance", "Balancer", 'label_values(quiclb_build_info{job="quiclb"}, instance)'))
        .with_variable(choice("service", "Service", f"label_values(quiclb_fail_open{{{INSTANCE}}}, service)"))
    )
    for number, panel in enumerate(contents, 1):
        if isinstance(panel, str):
            builder.with_row(dashboard.Row(panel).id(number))
        else:
            builder.with_panel(drawn(panel).id(number))
    return json.dumps(builder.build(), cls=JSONEncoder, indent=2, sort_keys=True) + "\n"


def choice(name: str, label: str, query: str) -> dashboard.QueryVariable:
    return (
        dashboard.QueryVariable(name)
        .label(label)
        .query(query)
        .datasource(SOURCE)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(VariableOption(selected=True, text="All", value="$__all"))
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(VariableSort.ALPHABETICAL_ASC)
    )


def drawn(panel: Panel) -> stat.Panel | statetimeline.Panel | timeseries.Panel:
    """The builder of one panel: a timeline of words, a number, or lines."""
    builder: stat.Panel | statetimeline.Panel | timeseries.Panel
    if panel.words is not None:
        builder = timeline(panel.words).height(HEIGHT)
    elif panel.width < WIDTH // 2:
        builder = number(panel.bad).height(STAT_HEIGHT)
    else:
        builder = lines(panel).height(HEIGHT)
    builder.title(panel.title).description(panel.text).datasource(SOURCE).span(panel.width).unit(panel.unit)
    for letter, (expression, legend) in zip("ABCDEF", panel.queries, strict=False):
        query = prometheus.Dataquery().expr(expression).legend_format(legend).ref_id(letter)
        builder.with_target(query)
    return builder


def lines(panel: Panel) -> timeseries.Panel:
    builder = (
        timeseries.Panel()
        .min(0)
        .fill_opacity(25 if panel.is_stacked else 5)
        .line_width(1)
        .show_points(VisibilityMode.NEVER)
        .legend(
            common.VizLegendOptions()
            .display_mode(LegendDisplayMode.LIST)
            .placement(LegendPlacement.BOTTOM)
            .show_legend(True)
        )
        .tooltip(common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI).sort(SortOrder.DESCENDING))
    )
    if panel.is_stacked:
        builder.stacking(common.StackingConfig().mode(StackingMode.NORMAL).group("A"))
    if panel.most is not None:
        builder.max(panel.most)
    return builder


def number(bad: str) -> stat.Panel:
    steps = {
        "": [Threshold(None, "text")],
        "above": [Threshold(None, "green"), Threshold(1, "red")],
        "below": [Threshold(None, "red"), Threshold(1, "green")],
    }[bad]
    return (
        stat.Panel()
        .graph_mode(BigValueGraphMode.NONE)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .decimals(0)
        .thresholds(dashboard.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(steps))
    )


def timeline(words: Mapping[str, str]) -> statetimeline.Panel:
    named = {
        str(n): ValueMappingResult(text=word, color=colour, index=n) for n, (word, colour) in enumerate(words.items())
    }
    mappings: list[ValueMapping] = [ValueMap(options=named)]
    return (
        statetimeline.Panel()
        .mappings(mappings)
        .color_scheme(dashboard.FieldColor().mode(FieldColorModeId.FIXED))
        .merge_values(True)
        .row_height(0.8)
        .legend(common.VizLegendOptions().show_legend(False).display_mode(LegendDisplayMode.LIST))
    )


if __name__ == "__main__":
    place = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    for name in DASHBOARDS:
        (place / f"{name}.json").write_text(made(name))
