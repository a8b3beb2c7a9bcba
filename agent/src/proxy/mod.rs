//! The story of one connection.

pub mod copy;
