//! The gate: what becomes of the connections of a pod that no agent has classified yet ([K.4]).
//!
//! It stands where the pods' common cgroup is, and holds also when no agent runs: a pod is let through only after an agent
//! has said what it is. Whether an enrolled pod's connection is captured or refused is not decided here.

/// What an agent knows of a pod.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Class {
    /// Nothing yet.
    Unknown = 0,
    /// It is outside the mesh.
    Out = 1,
    /// It is in the mesh, and has its entries in the other maps.
    In = 2,
}

impl Class {
    /// From a byte of a map; any other value is [`Class::Unknown`].
    #[inline(always)]
    pub const fn from_u8(byte: u8) -> Self {
        match byte {
            1 => Self::Out,
            2 => Self::In,
            _ => Self::Unknown,
        }
    }

    /// The word for logs and documents.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Out => "out",
            Self::In => "in",
        }
    }
}

/// Whether a pod's connection is for others to judge. `enrolled`: what a pod of the mesh connects from, or is connected at,
/// is in the maps; a namespace or an address that is not may be one that the pod was given after the agent had gone.
#[inline(always)]
pub const fn admits(class: Class, enrolled: bool) -> bool {
    match class {
        Class::Unknown => false,
        Class::Out => true,
        Class::In => enrolled,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_an_agent_has_classified_is_let_through() {
        for byte in 0..=u8::MAX {
            let class = Class::from_u8(byte);
            assert_eq!(class as u8, if byte <= 2 { byte } else { 0 });
            assert_eq!(admits(class, false), class == Class::Out);
            assert_eq!(admits(class, true), class != Class::Unknown);
        }
    }
}
