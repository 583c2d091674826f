//! A resolver for tests.

use std::net::IpAddr;

use hickory_resolver::proto::op::{Message, MessageType, OpCode, ResponseCode};
use hickory_resolver::proto::rr::{RData, Record, RecordType};
use tokio::net::UdpSocket;

use super::Resolver;

/// Asks a server that knows `two.example` (A 10.0.0.1 for 30 s, A 10.0.0.2 for 20 s, AAAA fd00::1 for 10 s), `four.example`
/// (A only) and `broken.example` (SERVFAIL); it does not know anything else.
pub(crate) async fn server() -> Resolver {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let address = socket.local_addr().unwrap();
    tokio::spawn(async move {
        let mut buffer = [0; 1500];
        while let Ok((length, from)) = socket.recv_from(&mut buffer).await {
            let asked = Message::from_vec(&buffer[..length]).unwrap();
            socket.send_to(&reply(&asked).to_vec().unwrap(), from).await.unwrap();
        }
    });
    Resolver::with_servers(&[address])
}

fn reply(asked: &Message) -> Message {
    let query = asked.queries[0].clone();
    let mut out = Message::new(asked.metadata.id, MessageType::Response, OpCode::Query);
    let name = query.name().to_ascii();
    let known: &[(u32, &str)] = match (name.as_str(), query.query_type()) {
        ("two.example.", RecordType::A) => &[(30, "10.0.0.1"), (20, "10.0.0.2")],
        ("two.example.", RecordType::AAAA) => &[(10, "fd00::1")],
        ("four.example.", RecordType::A) => &[(5, "10.0.0.4")],
        _ => &[],
    };
    out.metadata.response_code = match name.as_str() {
        "broken.example." => ResponseCode::ServFail,
        "two.example." | "four.example." => ResponseCode::NoError,
        _ => ResponseCode::NXDomain,
    };
    for (ttl, ip) in known {
        let data = RData::from(ip.parse::<IpAddr>().unwrap());
        out.add_answer(Record::from_rdata(query.name().clone(), *ttl, data));
    }
    out.add_query(query);
    out
}
