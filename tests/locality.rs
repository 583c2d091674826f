//! Three localities behind one name, with real sockets: the near one is used while it answers, then the next, then the
//! far one, and the near one again once its time is over.

mod support;

use std::collections::BTreeSet;

use support::{
    Killed, LIMIT, Machines, Proxy, access_log, certificates, curl, folder, give_to_proxy, privileged, public_binary,
    serve_as_app, start_app, wait_for,
};

const OBJECTS: &str = "
apiVersion: v1
kind: Node
metadata: {name: n1, labels: {topology.kubernetes.io/region: r1, topology.kubernetes.io/zone: z1}}
---
apiVersion: v1
kind: Pod
metadata: {name: client-1, namespace: shop, labels: {app: client}}
spec: {nodeName: n1, serviceAccountName: client}
status: {phase: Running, podIP: 10.81.0.1, conditions: [{type: Ready, status: 'True'}]}
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: web, namespace: shop}
spec:
  hosts: [web.example]
  addresses: [10.96.81.1]
  resolution: STATIC
  ports: [{number: 80, name: http, protocol: HTTP, targetPort: 8080}]
  endpoints:
  - {address: 10.81.0.11, locality: r1/z1}
  - {address: 10.81.0.12, locality: r1/z2}
  - {address: 10.81.0.13, locality: r2/z3}
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: web, namespace: shop}
spec:
  host: web.example
  trafficPolicy:
    outlierDetection: {consecutive5xxErrors: 1, interval: 1s, baseEjectionTime: 2s, maxEjectionPercent: 100}
";

/// The application's process; nothing in a normal run.
#[test]
fn application() {
    serve_as_app();
}

#[test]
fn traffic_stays_near_while_it_can() {
    if !privileged("traffic_stays_near_while_it_can") {
        return;
    }
    let dir = folder(&[("objects.yaml", OBJECTS)]);
    certificates(dir.path(), &[("client", "spiffe://cluster.local/ns/shop/sa/client")]);
    let binary = public_binary(dir.path());
    give_to_proxy(dir.path());
    let mut machines = Machines::new(&format!("place-{}", std::process::id())).expect("namespaces");
    let client = machines.space("client", &["10.81.0.1/8"]).expect("a namespace");
    let ips = ["10.81.0.11", "10.81.0.12", "10.81.0.13"];
    let mut servers = ips.map(|ip| {
        let space = machines.space(&ip[5..], &[&format!("{ip}/8")]).expect("a namespace");
        let app: Option<Killed> = Some(start_app(&space, "0.0.0.0:8080"));
        (space, app)
    });
    let rules = client.command(&binary.to_string_lossy()).args(["istio-iptables", "-i", "*", "-b", "*"]).output();
    assert!(rules.expect("it runs").status.success());
    let log = dir.path().join("log.jsonl");
    let mut command = client.command_as_proxy(&binary.to_string_lossy());
    command.args(["proxy", "--concurrency", "1", "--config"]).arg(dir.path().join("objects.yaml"));
    command.arg("--certs").arg(dir.path().join("client")).arg("--access-log").arg(&log);
    command.env("POD_NAMESPACE", "shop").env("POD_NAME", "client-1").env("INSTANCE_IP", "10.81.0.1");
    let _proxy = Proxy::start(command);

    let mut asked = 0;
    // Who answers so many requests in a row, by the log; failures do not count.
    let mut answering = |many: usize| -> BTreeSet<String> {
        let path = format!("/{asked}");
        asked += 1;
        let url = format!("http://10.96.81.1{path}");
        for _ in 0..many {
            curl(&client, &["-H", "host: web.example", &url]);
        }
        let lines = || access_log(&log).into_iter().filter(|l| l["path"] == path.as_str()).collect::<Vec<_>>();
        wait_for("the log", LIMIT, || lines().len() == many).expect("every request is logged");
        let good = lines().into_iter().filter(|l| l["code"] == 200);
        good.filter_map(|l| l["upstreamHost"].as_str().map(str::to_owned)).collect()
    };
    let only = |ip: &str| BTreeSet::from([format!("{ip}:8080")]);

    assert_eq!(answering(10), only(ips[0]));
    for next in [1, 2] {
        servers[next - 1].1 = None;
        wait_for("failover", LIMIT, || answering(5) == only(ips[next])).unwrap_or_else(|e| panic!("{e}: {next}"));
    }
    servers[0].1 = Some(start_app(&servers[0].0, "0.0.0.0:8080"));
    wait_for("the way back", LIMIT, || answering(5) == only(ips[0])).expect("ejections end");
}
