//! One address type for both families.

use core::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

/// An IPv6 address, or an IPv4 one mapped into it (RFC 4291 §2.5.5.2); network byte order.
///
/// Aligned so that the kernel side moves it in two words: with the alignment of a byte the compiler takes it apart, and
/// runs out of the 512 bytes of a program's stack.
#[repr(C, align(8))]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Addr {
    /// The sixteen bytes, most significant first.
    pub bytes: [u8; 16],
}

impl Addr {
    /// The unspecified address, `::`.
    pub const UNSPECIFIED: Self = Self { bytes: [0; 16] };

    /// Maps four bytes of an IPv4 address, most significant first.
    #[inline(always)]
    pub const fn from_v4(octets: [u8; 4]) -> Self {
        Self::from_be32(u32::from_ne_bytes(octets))
    }

    /// From the kernel's `__be32` as a context holds it.
    #[inline(always)]
    pub const fn from_be32(word: u32) -> Self {
        Self::from_be32x4([0, 0, u32::from_ne_bytes([0, 0, 0xff, 0xff]), word])
    }

    /// From the kernel's four `__be32` as a context holds them.
    #[inline(always)]
    pub const fn from_be32x4(words: [u32; 4]) -> Self {
        let (a, b) = (words[0].to_ne_bytes(), words[1].to_ne_bytes());
        let (c, d) = (words[2].to_ne_bytes(), words[3].to_ne_bytes());
        Self { bytes: [a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3], c[0], c[1], c[2], c[3], d[0], d[1], d[2], d[3]] }
    }

    /// The four words as the kernel's contexts want them written.
    #[inline(always)]
    pub const fn to_be32x4(self) -> [u32; 4] {
        // SAFETY: as above, and the type's alignment is at least a word's.
        unsafe { core::mem::transmute::<Self, [u32; 4]>(self) }
    }

    /// Whether this is an IPv4 address, mapped.
    #[inline(always)]
    pub const fn is_v4(self) -> bool {
        let [a, b, c, d] = self.to_be32x4();
        let _ = d;
        a == 0 && b == 0 && c == u32::from_ne_bytes([0, 0, 0xff, 0xff])
    }

    /// Whether this is `::`, or `0.0.0.0` mapped.
    #[inline(always)]
    pub const fn is_unspecified(self) -> bool {
        let [a, b, c, d] = self.to_be32x4();
        a == 0 && b == 0 && d == 0 && (c == 0 || c == u32::from_ne_bytes([0, 0, 0xff, 0xff]))
    }

    /// Whether this is 127/8 or `::1`.
    #[inline(always)]
    pub const fn is_loopback(self) -> bool {
        if self.is_v4() {
            return self.bytes[12] == 127;
        }
        let [a, b, c, d] = self.to_be32x4();
        a == 0 && b == 0 && c == 0 && d == u32::from_ne_bytes([0, 0, 0, 1])
    }

    /// As the standard library's type; mapped addresses come back as IPv4.
    pub const fn ip(self) -> IpAddr {
        let b = self.bytes;
        if self.is_v4() {
            IpAddr::V4(Ipv4Addr::new(b[12], b[13], b[14], b[15]))
        } else {
            IpAddr::V6(Ipv6Addr::from_octets(b))
        }
    }
}

impl From<IpAddr> for Addr {
    fn from(ip: IpAddr) -> Self {
        match ip {
            IpAddr::V4(v4) => Self::from_v4(v4.octets()),
            IpAddr::V6(v6) => Self { bytes: v6.octets() },
        }
    }
}

impl fmt::Display for Addr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.ip().fmt(f)
    }
}

impl fmt::Debug for Addr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.ip().fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addr(text: &str) -> Addr {
        Addr::from(text.parse::<IpAddr>().expect("a literal of this test"))
    }

    #[test]
    fn mapped_addresses_come_back_as_ipv4() {
        assert_eq!(addr("10.1.2.3").ip().to_string(), "10.1.2.3");
        assert_eq!(addr("::ffff:10.1.2.3").ip().to_string(), "10.1.2.3");
        assert_eq!(addr("fd00::1").ip().to_string(), "fd00::1");
        assert!(addr("10.1.2.3").is_v4() && !addr("fd00::1").is_v4() && !addr("::1").is_v4());
    }

    #[test]
    fn loopback_is_known_in_both_families() {
        for (text, loopback) in [
            ("127.0.0.1", true),
            ("127.6.3.9", true),
            ("::1", true),
            ("::ffff:127.0.0.1", true),
            ("10.0.0.127", false),
            ("::", false),
            ("7f00::1", false),
        ] {
            assert_eq!(addr(text).is_loopback(), loopback, "{text}");
        }
    }

    #[test]
    fn words_of_a_context_round_trip() {
        let a = addr("fd00:1:2:3:4:5:6:7");
        assert_eq!(Addr::from_be32x4(a.to_be32x4()), a);
        assert_eq!(Addr::from_be32(u32::from_ne_bytes([10, 0, 0, 9])), addr("10.0.0.9"));
        assert!(addr("::").is_unspecified() && addr("0.0.0.0").is_unspecified() && !addr("::1").is_unspecified());
    }
}
