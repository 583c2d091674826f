//! This machine's addresses, asked of the kernel: there is no file that tells addresses of both families with their
//! interfaces, and an image without a shell has no `ip`.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use socket2::{Domain, Protocol, Socket, Type};

/// `AF_NETLINK`.
const NETLINK: i32 = 16;
const GET_LINK: u16 = 18;
const NEW_LINK: u16 = 16;
const GET_ADDRESS: u16 = 22;
const NEW_ADDRESS: u16 = 20;
const ERROR: u16 = 2;
const DONE: u16 = 3;
/// A request for everything.
const DUMP: u16 = 0x301;
const HEADER: usize = 16;
const LINK_HEADER: usize = 16;
const ADDRESS_HEADER: usize = 8;
const INTERFACE_NAME: u16 = 3;
const ADDRESS: u16 = 1;
const LOCAL: u16 = 2;
const UP: u32 = 1;
const LOOPBACK: u32 = 8;

/// Interfaces that are up and not loopback, with their addresses that are not link-local: interfaces as the kernel counts
/// them, of each its IPv4 addresses first.
///
/// # Errors
/// When the kernel does not answer.
pub fn addresses() -> io::Result<Vec<(String, IpAddr)>> {
    let links = dump(GET_LINK, LINK_HEADER)?;
    let addresses = dump(GET_ADDRESS, ADDRESS_HEADER)?;
    Ok(usable(&links, &addresses))
}

/// Asks for everything of a kind.
fn dump(kind: u16, header: usize) -> io::Result<Vec<u8>> {
    let mut socket = Socket::new(Domain::from(NETLINK), Type::RAW, Some(Protocol::from(0)))?;
    let mut request = Vec::with_capacity(HEADER + header);
    request.extend(u32::try_from(HEADER + header).unwrap_or_default().to_ne_bytes());
    request.extend(kind.to_ne_bytes());
    request.extend(DUMP.to_ne_bytes());
    request.resize(HEADER + header, 0);
    socket.write_all(&request)?;
    let mut answer = Vec::new();
    let mut part = vec![0; 1 << 16];
    loop {
        let read = socket.read(&mut part)?;
        answer.extend_from_slice(&part[..read]);
        match messages(&part[..read]).last() {
            Some((DONE, _)) => return Ok(answer),
            Some((ERROR, _)) | None => return Err(io::Error::other("netlink refused the request")),
            Some(_) => {}
        }
    }
}

/// Messages with their types.
fn messages(bytes: &[u8]) -> Vec<(u16, &[u8])> {
    let mut out = Vec::new();
    let mut rest = bytes;
    while let Some(length) = u32_at(rest, 0).and_then(|n| usize::try_from(n).ok()) {
        let (Some(kind), Some(body)) = (u16_at(rest, 4), rest.get(HEADER..length)) else { break };
        out.push((kind, body));
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    out
}

/// Attributes with their types.
fn attributes(bytes: &[u8]) -> Vec<(u16, &[u8])> {
    let mut out = Vec::new();
    let mut rest = bytes;
    while let Some(length) = u16_at(rest, 0).map(usize::from) {
        let (Some(kind), Some(body)) = (u16_at(rest, 2), rest.get(4..length)) else { break };
        out.push((kind, body));
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    out
}

fn usable(links: &[u8], addresses: &[u8]) -> Vec<(String, IpAddr)> {
    let mut names: BTreeMap<u32, String> = BTreeMap::new();
    for (_, body) in messages(links).into_iter().filter(|(kind, _)| *kind == NEW_LINK) {
        let (Some(index), Some(flags)) = (u32_at(body, 4), u32_at(body, 8)) else { continue };
        if flags & UP == 0 || flags & LOOPBACK != 0 {
            continue;
        }
        let found = attributes(body.get(LINK_HEADER..).unwrap_or_default());
        let name = found.iter().find(|(kind, _)| *kind == INTERFACE_NAME).map(|(_, name)| *name).unwrap_or_default();
        let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
        names.insert(index, String::from_utf8_lossy(name).into_owned());
    }
    let mut found: Vec<(u32, IpAddr)> = Vec::new();
    for (_, body) in messages(addresses).into_iter().filter(|(kind, _)| *kind == NEW_ADDRESS) {
        let said = attributes(body.get(ADDRESS_HEADER..).unwrap_or_default());
        let ip = [LOCAL, ADDRESS].iter().find_map(|kind| address(said.iter().find(|(k, _)| k == kind)?.1));
        if let (Some(index), Some(ip)) = (u32_at(body, 4), ip) {
            found.push((index, ip));
        }
    }
    let of = |(index, name): (&u32, &String)| {
        let own = found.iter().filter(move |(at, _)| at == index).map(|(_, ip)| *ip);
        own.filter(counts).map(|ip| (name.clone(), ip)).collect::<Vec<_>>()
    };
    names.iter().flat_map(of).collect()
}

/// Whether others can reach it.
fn counts(ip: &IpAddr) -> bool {
    let link_local = match ip {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    };
    !(ip.is_loopback() || ip.is_unspecified() || link_local)
}

fn address(bytes: &[u8]) -> Option<IpAddr> {
    if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
        return Some(Ipv4Addr::from(v4).into());
    }
    <[u8; 16]>::try_from(bytes).ok().map(|v6| Ipv6Addr::from(v6).to_canonical())
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attribute(kind: u16, body: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        out.extend(u16::try_from(4 + body.len()).unwrap().to_ne_bytes());
        out.extend(kind.to_ne_bytes());
        out.extend(body);
        out.resize(out.len().next_multiple_of(4), 0);
        out
    }

    fn message(kind: u16, body: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        out.extend(u32::try_from(HEADER + body.len()).unwrap().to_ne_bytes());
        out.extend(kind.to_ne_bytes());
        out.resize(HEADER, 0);
        out.extend(body);
        out.resize(out.len().next_multiple_of(4), 0);
        out
    }

    fn link(index: u32, flags: u32, name: &str) -> Vec<u8> {
        let mut body = vec![0; 4];
        body.extend(index.to_ne_bytes());
        body.extend(flags.to_ne_bytes());
        body.resize(LINK_HEADER, 0);
        body.extend(attribute(INTERFACE_NAME, format!("{name}\0").as_bytes()));
        message(NEW_LINK, &body)
    }

    fn own(index: u32, kind: u16, ip: &[u8]) -> Vec<u8> {
        let mut body = vec![0; 4];
        body.extend(index.to_ne_bytes());
        body.extend(attribute(kind, ip));
        message(NEW_ADDRESS, &body)
    }

    #[test]
    fn addresses_that_count() {
        let links = [link(1, UP | LOOPBACK, "lo"), link(2, UP, "eth0"), link(3, 0, "down"), link(7, UP, "e1")].concat();
        let v6 = |text: &str| text.parse::<Ipv6Addr>().unwrap().octets();
        let addresses = [
            own(1, LOCAL, &[127, 0, 0, 1]),
            own(7, LOCAL, &[10, 0, 2, 5]),
            own(2, LOCAL, &[10, 0, 1, 5]),
            own(2, LOCAL, &[169, 254, 1, 1]),
            own(3, LOCAL, &[10, 0, 3, 5]),
            own(2, ADDRESS, &v6("fe80::1")),
            own(2, ADDRESS, &v6("2001:db8::5")),
            message(DONE, &[0; 4]),
        ]
        .concat();
        let expected = [("eth0", "10.0.1.5"), ("eth0", "2001:db8::5"), ("e1", "10.0.2.5")];
        let expected: Vec<(String, IpAddr)> = expected.map(|(n, ip)| (n.to_owned(), ip.parse().unwrap())).into();
        assert_eq!(usable(&links, &addresses), expected);
        assert!(usable(&links[..20], &addresses[..30]).is_empty(), "cut off");
    }

    #[test]
    fn the_kernel_answers() {
        addresses().unwrap();
    }
}
