// Istio's own definitions of its kinds, which tests/tests/crds compares ours with: nothing is built of them. Another version: here,
// in tests/src/apiserver/assets.rs, and `go mod download istio.io/api` for go.sum.
module culvert.test/istio

go 1.21

require istio.io/api v1.31.1
