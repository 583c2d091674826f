//! The PROXY protocol header, written before a connection's own bytes.

use std::fmt::Write;
use std::net::SocketAddr;

const V2_SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";
/// Version 2, command PROXY.
const V2_PROXY: u8 = 0x21;
const V2_TCP4: u8 = 0x11;
const V2_TCP6: u8 = 0x21;

/// Which form of the header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    /// The text line.
    V1,
    /// The binary form.
    V2,
}

/// The header for a connection from `source` to `destination`. Mixed families are written as IPv6, with the IPv4
/// address mapped.
pub fn header(version: Version, source: SocketAddr, destination: SocketAddr) -> Vec<u8> {
    match version {
        Version::V1 => v1(source, destination),
        Version::V2 => v2(source, destination),
    }
}

fn v1(source: SocketAddr, destination: SocketAddr) -> Vec<u8> {
    let mut line = String::with_capacity(108);
    let written = match (source, destination) {
        (SocketAddr::V4(s), SocketAddr::V4(d)) => {
            write!(line, "PROXY TCP4 {} {} {} {}\r\n", s.ip(), d.ip(), s.port(), d.port())
        }
        (s, d) => write!(line, "PROXY TCP6 {} {} {} {}\r\n", mapped(s), mapped(d), s.port(), d.port()),
    };
    written.expect("writing to a string cannot fail");
    line.into_bytes()
}

fn v2(source: SocketAddr, destination: SocketAddr) -> Vec<u8> {
    let mut bytes = V2_SIGNATURE.to_vec();
    bytes.push(V2_PROXY);
    if let (SocketAddr::V4(s), SocketAddr::V4(d)) = (source, destination) {
        bytes.push(V2_TCP4);
        bytes.extend(12u16.to_be_bytes());
        bytes.extend(s.ip().octets());
        bytes.extend(d.ip().octets());
    } else {
        bytes.push(V2_TCP6);
        bytes.extend(36u16.to_be_bytes());
        bytes.extend(mapped(source).octets());
        bytes.extend(mapped(destination).octets());
    }
    bytes.extend(source.port().to_be_bytes());
    bytes.extend(destination.port().to_be_bytes());
    bytes
}

fn mapped(address: SocketAddr) -> std::net::Ipv6Addr {
    match address {
        SocketAddr::V4(v4) => v4.ip().to_ipv6_mapped(),
        SocketAddr::V6(v6) => *v6.ip(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    #[test]
    fn text_form() {
        let line = header(Version::V1, at("10.0.0.1:1000"), at("10.0.0.2:80"));
        assert_eq!(line, b"PROXY TCP4 10.0.0.1 10.0.0.2 1000 80\r\n");
        let line = header(Version::V1, at("[2001:db8::1]:1"), at("[2001:db8::2]:2"));
        assert_eq!(line, b"PROXY TCP6 2001:db8::1 2001:db8::2 1 2\r\n");
    }

    #[test]
    fn binary_form() {
        let v4 = header(Version::V2, at("1.2.3.4:258"), at("5.6.7.8:80"));
        assert_eq!(v4[12..], [0x21, 0x11, 0, 12, 1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 0, 80]);
        assert_eq!(header(Version::V2, at("[::1]:1"), at("5.6.7.8:80")).len(), 16 + 36);
    }
}
