{{- define "quiclb.name" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name }}{{ else }}{{ .Release.Name }}-{{ .Chart.Name }}{{ end }}
{{- end }}

{{- define "quiclb.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "quiclb.labels" -}}
{{ include "quiclb.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{/* The file. Keys of maps are strings in JSON, and quiclb takes "0" for the number. */}}
{{- define "quiclb.config" -}}
{{ toYaml (merge (dict "engine" .Values.engine) .Values.config) }}
{{- end }}

{{/* The port at the end of `metrics`, and the address if the kubelet has to be told: on the node's own network. */}}
{{- define "quiclb.probe" -}}
{{- $port := regexFind "[0-9]+$" .Values.config.metrics -}}
{{- $host := regexReplaceAll ":[0-9]+$" .Values.config.metrics "" | trimPrefix "[" | trimSuffix "]" -}}
{{- if and (eq .Values.engine "xdp") (not (has $host (list "0.0.0.0" "::"))) -}}
host: {{ $host | quote }}
{{ end -}}
port: {{ $port }}
{{- end }}

{{- define "quiclb.pod" -}}
metadata:
  labels: {{- include "quiclb.selector" . | nindent 4 }}
  {{- if or .Values.restartOnChange .Values.podAnnotations }}
  annotations:
    {{- with .Values.podAnnotations }}{{ toYaml . | nindent 4 }}{{ end }}
    {{- if .Values.restartOnChange }}
    checksum/config: {{ include "quiclb.config" . | sha256sum }}
    {{- end }}
  {{- end }}
spec:
  automountServiceAccountToken: false
  terminationGracePeriodSeconds: {{ .Values.terminationGracePeriodSeconds }}
  {{- with .Values.imagePullSecrets }}
  imagePullSecrets: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  {{- with .Values.nodeSelector }}
  nodeSelector: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.tolerations }}
  tolerations: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.affinity }}
  affinity: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- if eq .Values.engine "xdp" }}
  hostNetwork: true
  dnsPolicy: ClusterFirstWithHostNet
  securityContext:
    seccompProfile: {type: RuntimeDefault}
  {{- else }}
  securityContext:
    runAsNonRoot: true
    runAsUser: 65532
    runAsGroup: 65532
    fsGroup: 65532 # who may read the keys
    seccompProfile: {type: RuntimeDefault}
    sysctls: # instead of CAP_NET_BIND_SERVICE
      - {name: net.ipv4.ip_unprivileged_port_start, value: "0"}
  {{- end }}
  containers:
    - name: quiclb
      image: "{{ .Values.image.repository }}:{{ .Values.image.tag | default .Values.engine }}"
      imagePullPolicy: {{ .Values.image.pullPolicy }}
      args: [run, --watch, --config, /etc/quiclb/quiclb.yaml]
      env:
        - {name: RUNTIME_DIRECTORY, value: /run/quiclb}
      {{- if eq .Values.engine "udp" }}
      ports:
        {{- range include "quiclb.ports" . | fromYamlArray }}
        - {name: quic-{{ . }}, containerPort: {{ . }}, protocol: UDP}
        {{- end }}
        - {name: metrics, containerPort: {{ regexFind "[0-9]+$" .Values.config.metrics }}, protocol: TCP}
      {{- end }}
      startupProbe:
        httpGet:
          path: /livez
          {{- include "quiclb.probe" . | nindent 10 }}
        periodSeconds: 1
        failureThreshold: 30
      livenessProbe:
        httpGet:
          path: /livez
          {{- include "quiclb.probe" . | nindent 10 }}
        periodSeconds: 10
        timeoutSeconds: 5
      readinessProbe:
        httpGet:
          path: /readyz
          {{- include "quiclb.probe" . | nindent 10 }}
        periodSeconds: 2
        timeoutSeconds: 2
      {{- if eq .Values.engine "udp" }}
      lifecycle:
        preStop:
          exec: {command: [sleep, "{{ .Values.preStopSeconds }}"]}
      {{- end }}
      {{- with .Values.resources }}
      resources: {{- toYaml . | nindent 8 }}
      {{- end }}
      securityContext:
        readOnlyRootFilesystem: true
        {{- if eq .Values.engine "xdp" }}
        runAsUser: 0 # the BPF file system is root's alone
        allowPrivilegeEscalation: true # Kubernetes allows no `false` beside SYS_ADMIN
        capabilities:
          drop: [ALL]
          add: [BPF, NET_ADMIN, SYS_ADMIN, NET_BIND_SERVICE]
        {{- else }}
        allowPrivilegeEscalation: false
        capabilities: {drop: [ALL]}
        {{- end }}
      volumeMounts:
        - {name: config, mountPath: /etc/quiclb, readOnly: true}
        {{- if eq .Values.engine "xdp" }}
        - {name: bpf, mountPath: /sys/fs/bpf}
        - {name: run, mountPath: /run/quiclb}
        {{- else }}
        - {name: run, mountPath: /run}
        {{- end }}
  volumes:
    # One volume, so that configuration and keys change at the same moment.
    - name: config
      projected:
        defaultMode: {{ if eq .Values.engine "xdp" }}0400{{ else }}0440{{ end }}
        sources:
          - configMap:
              name: {{ include "quiclb.name" . }}
          - secret:
              name: {{ .Values.existingSecret }}
              items:
                {{- range include "quiclb.keyFiles" . | fromYamlArray }}
                - {key: {{ base . }}, path: {{ . }}}
                {{- end }}
    - name: run
      {{- if eq .Values.engine "xdp" }}
      hostPath: {path: /run/quiclb, type: DirectoryOrCreate}
    - name: bpf
      hostPath: {path: /sys/fs/bpf, type: Directory}
      {{- else }}
      emptyDir: {medium: Memory, sizeLimit: 64Mi}
      {{- end }}
{{- end }}

{{/* Ports that the configuration listens on, each once. */}}
{{- define "quiclb.ports" -}}
{{- $ports := list -}}
{{- range .Values.config.services -}}
{{- range .listen -}}
{{- $ports = append $ports (regexFind "[0-9]+$" .) -}}
{{- end -}}
{{- end -}}
{{ toJson ($ports | uniq | sortAlpha) }}
{{- end }}

{{/* Files that the configuration names below secrets/, each once. */}}
{{- define "quiclb.keyFiles" -}}
{{- $found := list -}}
{{- range .Values.config.services -}}
{{- range index . "cid-configs" -}}
{{- $found = append $found (index . "key-file") -}}
{{- $found = append $found (index . "reset-key-file") -}}
{{- end -}}
{{- end -}}
{{- range (.Values.config.admin | default dict) | values -}}
{{- if kindIs "string" . -}}{{- $found = append $found . -}}{{- end -}}
{{- end -}}
{{- $files := list -}}
{{- range $found -}}
{{- if and . (hasPrefix "secrets/" .) -}}{{- $files = append $files . -}}{{- end -}}
{{- end -}}
{{ toJson ($files | uniq | sortAlpha) }}
{{- end }}
