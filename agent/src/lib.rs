//! Culvert: a sidecarless service mesh for Linux nodes. This page is the architecture.
//!
//! Three flows, each in one direction, joined only in [`app`]:
//!
//! ```text
//! policy   kube | file ─► source ─► model ─► policy::compile ─► datapath ─► BPF maps
//! pods     source, cgroups, netns ─► pods ─► enroll ─┬─► datapath ─► BPF maps
//!                                                    └─► listen (sockets inside the pod)
//! bytes    socket ─► listen ─► proxy ─► tunnel ─► peer
//!                               └─ asks policy::decide, identity and dns
//! ```
//!
//! Read the table downwards: a module imports only from rows above it.
//!
//! | module | its one job |
//! |---|---|
//! | [`model`] | plain values: workload, service, endpoint, identity, policy as the user wrote it; no I/O |
//! | [`policy`] | compiles the model; routes and decides one connection; pure, and the answer names the rule |
//! | [`drain`], [`telemetry`], [`dns`] | orderly shutdown; logs, access log, metrics, traces, open connections, refusals and readiness; from names to addresses |
//! | [`source`] | a folder of manifests, or an API server, as whole snapshots of the model |
//! | [`validate`] | what is to be said of objects by themselves: decoding's word, and that of policies |
//! | [`netns`] | enter a network namespace and come back; list, read and destroy the sockets in it |
//! | [`pods`] | the pods of this node, joined with their cgroup and network namespace |
//! | [`datapath`] | load, attach, and make the maps equal to what is wanted; the only place that imports aya |
//! | [`busy_poll`] | a worker that expects work within moments looks for it before it sleeps |
//! | [`identity`] | keys, certificates, trust bundle, rotation; from a peer's certificate to its SPIFFE ID |
//! | [`tunnel`] | one CONNECT stream over mTLS, and the pool; knows HTTP/2 and rustls, not pods, policy or Kubernetes |
//! | [`limits`] | what one pod, and one peer, may take of the agent |
//! | [`listen`] | bind inside a pod |
//! | [`proxy`] | the story of one connection: `outbound.rs`, `inbound.rs`, `copy.rs` |
//! | [`worker`] | one thread that carries connections |
//! | [`connections`] | connections that no worker carries: told, judged again, closed; the proof that there are no others |
//! | [`gate`] | which pods the kernel lets through before they are in the mesh, and which it holds |
//! | [`enroll`] | bring a pod in and out, in the right order, and again without harm |
//! | [`announce`] | tell the cluster what became of the node's pods |
//! | [`leave`] | whether the node is left for good: its DaemonSet is deleted |
//! | [`report`] | tell `culvert control` which policies are in force on the node |
//! | [`admin`] | what an operator can ask a running agent: what it believes, its connections, why one was refused, what can go to STRICT, its log level |
//! | [`ca`] | the server side of the CA API: who may ask for which identity, and the signing |
//! | [`control`] | the cluster's part: the CA by the API server's word, its roots, the webhook, the status of policies, and who leads; no data path, no aya |
//! | [`preflight`] | whether the node can have an agent, and what to do where it cannot |
//! | [`resident`] | gives back text of the program that does not run |
//! | [`cli`], [`config`] | what was typed; then what it means |
//! | [`app`] | wiring, and nothing clever |
//!
//! # One connection
//!
//! A pod's `connect` meets the kernel program `connect4/6`, which notes the original destination at the socket and
//! rewrites the address to the pod's own, on one of 512 reserved ports; `sk_lookup` in the pod's namespace recognises exactly
//! this connection and hands it to a listener of one of the workers, where [`proxy::outbound`] asks the snapshot for a
//! route and opens a stream in a tunnel that starts from the pod's own address. On the other node the tunnel reaches the
//! server pod's namespace, where `sk_lookup` hands port 15008 to a worker; [`proxy::inbound`] verifies, decides, and
//! connects to the application from a loopback address. `getpeername` and `accept` show both applications each other's
//! real addresses. Plaintext to an enrolled pod is decided in `sk_lookup` alone; what it passes no process of ours
//! touches, and `sock_ops` reports its end. What leaves a pod without `connect` is stopped at the node's end of its veth. A pod
//! that no agent has classified yet is held in both directions by programs at the pods' common cgroup ([`gate`]).
//!
//! # Threads
//!
//! | thread | does |
//! |---|---|
//! | main | reads the source, compiles, enrols, renews certificates, gives the sign of life |
//! | `culvert-worker-N` | accepts and carries connections; nothing of a connection ever leaves its worker |
//! | pods | follows the cgroup tree |
//! | admin | answers readiness and operators |
//! | metrics | answers whoever collects metrics |
//! | access log, log | write lines, so that nobody else waits for whoever reads them |
//! | spans | exports traces, where a collector is configured |
//! | `jemalloc_bg_thd` | the allocator's own: gives unused memory back |
//!
//! # Ports
//!
//! In a pod: 15008 tunnels (by `sk_lookup`; the sockets themselves listen from 65000 on), 512 to 1023 the redirected
//! connections of the pod to itself. On the node: 15021 readiness, 15020 metrics, 15000 (loopback) operators. The CA answers at 15012,
//! the webhook at 15017.

pub mod admin;
pub mod announce;
pub mod app;
pub mod busy_poll;
pub mod ca;
pub mod cli;
pub mod config;
pub mod connections;
pub mod control;
pub mod datapath;
pub mod dns;
pub mod drain;
pub mod enroll;
#[cfg(test)]
mod fuzz;
pub mod gate;
pub mod identity;
pub mod leave;
pub mod limits;
pub mod listen;
pub mod model;
pub mod netns;
pub mod pods;
pub mod policy;
pub mod preflight;
pub mod proxy;
pub mod report;
pub mod resident;
pub mod source;
pub mod telemetry;
pub mod tunnel;
pub mod validate;
pub mod worker;
