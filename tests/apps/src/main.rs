//! Programs of the sandbox's pods that speak WebSocket and gRPC through the libraries that applications use. They are
//! apart from `culvert-pod`, whose crate has few dependencies because `xtask` is built from it first.
//!
//! A client holds one conversation open: a numbered message at a steady pace, each answered by the server. It prints a
//! [`Conversation`](culvert_tests::programs::Conversation) as JSON and exits 0 also if the conversation broke: how it
//! ended is a result.

mod grpc;
mod web_socket;

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Result;
use clap::Parser;

/// Programs of the sandbox's pods that speak WebSocket and gRPC.
#[derive(Parser)]
#[command(name = "culvert-app")]
enum Program {
    /// Echo the messages of WebSocket clients.
    WsServe {
        /// Address and port.
        #[arg(long)]
        listen: SocketAddr,
    },
    /// Hold one WebSocket open.
    WsTalk(Talk),
    /// Answer the messages of bidirectional gRPC streams.
    GrpcServe {
        /// Address and port.
        #[arg(long)]
        listen: SocketAddr,
    },
    /// Hold one bidirectional gRPC stream open.
    GrpcTalk(Talk),
}

/// What a client does.
#[derive(clap::Args)]
struct Talk {
    /// Address and port.
    #[arg(long)]
    to: SocketAddr,
    /// Path of the request; gRPC has its own.
    #[arg(long, default_value = "/")]
    path: String,
    /// Text in every message.
    #[arg(long)]
    marker: String,
    /// For how long, milliseconds.
    #[arg(long)]
    hold_ms: u64,
    /// Pause between two messages, milliseconds.
    #[arg(long, default_value_t = 100)]
    interval_ms: u64,
    /// Length of each message, bytes, at least that of the marker.
    #[arg(long, default_value_t = 1024)]
    bytes: usize,
    /// Limit of one answer, milliseconds.
    #[arg(long, default_value_t = 10_000)]
    timeout_ms: u64,
}

impl Talk {
    fn hold(&self) -> Duration {
        Duration::from_millis(self.hold_ms)
    }

    fn interval(&self) -> Duration {
        Duration::from_millis(self.interval_ms)
    }

    fn limit(&self) -> Duration {
        Duration::from_millis(self.timeout_ms)
    }

    /// Message number `number`.
    fn message(&self, number: u64) -> String {
        let mut text = format!("{number} {} ", self.marker);
        while text.len() < self.bytes {
            text.push(char::from(b'a' + u8::try_from((number + text.len() as u64) % 26).unwrap_or(0)));
        }
        text
    }
}

fn main() -> Result<()> {
    match Program::parse() {
        Program::WsServe { listen } => web_socket::serve(listen),
        Program::WsTalk(talk) => {
            let told = web_socket::talk(&talk);
            print(&told)
        }
        Program::GrpcServe { listen } => grpc::serve(listen),
        Program::GrpcTalk(talk) => {
            let told = grpc::talk(&talk)?;
            print(&told)
        }
    }
}

fn print(told: &culvert_tests::programs::Conversation) -> Result<()> {
    println!("{}", serde_json::to_string(told)?);
    Ok(())
}
