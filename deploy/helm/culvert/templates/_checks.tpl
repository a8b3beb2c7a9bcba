{{- /* What no schema can say: values that exclude each other. Each is one line with the remedy. */ -}}
{{- define "culvert.checks" -}}
{{- $ca := .Values.ca.address -}}
{{- $profile := .Values.agent.appArmorProfile -}}
{{- if ne .Release.Namespace "istio-system" -}}
{{- $text := "the mesh's namespace is istio-system, and this release's is %s: install with --namespace istio-system" -}}
{{- fail (printf $text .Release.Namespace) -}}
{{- end -}}
{{- if and (not .Values.control.enabled) (hasPrefix "culvert-control." $ca) -}}
{{- $text := "ca.address is %s, which control.enabled=false leaves out: set it, as to istiod.istio-system.svc:15012" -}}
{{- fail (printf $text $ca) -}}
{{- end -}}
{{- if and (eq $profile.type "Localhost") (not $profile.localhostProfile) -}}
{{- fail "agent.appArmorProfile.type is Localhost: set agent.appArmorProfile.localhostProfile to its name on the nodes" -}}
{{- end -}}
{{- end -}}

{{- define "culvert.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}
