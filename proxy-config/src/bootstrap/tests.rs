#![cfg(test)]

use serde_json::json;

use super::*;

const CLUSTER_ENV: &[(&str, &str)] = &[
    ("ISTIO_METAJSON_LABELS", r#"{"app":"pay","version":"v1","istio-locality":"r.z.s"}"#),
    ("ISTIO_META_AUTO_REGISTER_GROUP", "pay"),
    ("ISTIO_META_CLUSTER_ID", "Kubernetes"),
    ("ISTIO_META_DNS_CAPTURE", "true"),
    ("ISTIO_META_MESH_ID", ""),
    ("ISTIO_META_NETWORK", "vm-network"),
    ("ISTIO_META_POD_PORTS", "[ {\"name\":\"http\", \"containerPort\":8080} ]"),
    ("ISTIO_META_WORKLOAD_NAME", "pay"),
    ("POD_NAMESPACE", "payments"),
    ("SERVICE_ACCOUNT", "pay-sa"),
    ("TRUST_DOMAIN", ""),
    // What the start script adds.
    ("INSTANCE_IP", "10.0.1.5"),
    ("POD_NAME", "vm"),
    ("PROV_CERT", "./etc/certs"),
    ("OUTPUT_CERTS", "./etc/certs"),
    ("CA_ADDR", "istiod.istio-system.svc:15012"),
    ("PROXY_CONFIG", "\nserviceCluster: pay.payments\ncontrolPlaneAuthPolicy: MUTUAL_TLS\n"),
];
const MESH: &str = "defaultConfig:\n  proxyMetadata: {ISTIO_META_NETWORK: other, ISTIO_META_MESH: m}\n  \
    readinessProbe:\n    httpGet: {path: /health, port: 8080, scheme: HTTP}\n    failureThreshold: 3\n";

fn told<'a>(extra: &[(&str, &str)], exists: &'a dyn Fn(&Path) -> bool) -> Told<'a> {
    let variables = CLUSTER_ENV.iter().chain(extra).map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
    Told {
        variables: Variables(variables),
        flags: Flags::default(),
        mesh: Some(Source { name: "mesh".to_owned(), text: MESH.to_owned() }),
        labels: None,
        annotations: None,
        addresses: vec![
            ("eth0".to_owned(), "10.0.1.5".parse().unwrap()),
            ("eth1".to_owned(), "10.9.9.9".parse().unwrap()),
        ],
        exists,
        credential_socket: false,
        identity_socket: false,
    }
}

fn vm(extra: &[(&str, &str)]) -> Result<Bootstrap, Refused> {
    bootstrap(told(extra, &|path| path.ends_with("etc/certs/root-cert.pem")))
}

#[test]
fn a_vm_of_an_unmodified_bundle() {
    let vm = vm(&[]).unwrap();
    assert_eq!(vm.node.id(), "sidecar~10.0.1.5~vm.payments~payments.svc.cluster.local");
    assert_eq!(vm.node.service_cluster, "pay.payments");
    let metadata = &vm.node.metadata;
    assert_eq!(metadata["INSTANCE_IPS"], "10.0.1.5,10.9.9.9");
    assert_eq!(metadata["POD_PORTS"], r#"[{"name":"http","containerPort":8080,"protocol":""}]"#);
    assert_eq!(
        (&metadata["NETWORK"], &metadata["MESH"], &metadata["MESH_ID"]),
        (&json!("vm-network"), &json!("m"), &json!(""))
    );
    assert_eq!(metadata["LABELS"], json!({"app": "pay", "version": "v1", "istio-locality": "r/z/s"}));
    assert_eq!((&metadata["LABELS"], &metadata["istio-locality"]), (&metadata["STATIC_LABELS"], &json!("r.z.s")));
    assert_eq!(vm.node.locality.sub_zone, "s");
    assert_eq!((&metadata["DNS_CAPTURE"], &metadata["ENVOY_STATUS_PORT"]), (&json!("true"), &json!(15021)));
    assert_eq!(metadata["PILOT_SAN"], json!(["istiod.istio-system.svc"]));
    assert_eq!(metadata["PROXY_CONFIG"]["readinessProbe"]["failureThreshold"], 3);
    assert_eq!(metadata["PROXY_CONFIG"]["controlPlaneAuthPolicy"], "MUTUAL_TLS");
    assert_eq!(vm.dns.map(|dns| dns.listen).as_deref(), Some("localhost:15053"));
    let Identity::Ca(ca) = vm.identity else { panic!("a certificate is asked for") };
    let root = Some(Roots::File(PathBuf::from("./etc/certs/root-cert.pem")));
    assert_eq!((&vm.xds.roots, &ca.server.roots), (&root, &root));
    assert_eq!((&*ca.trust_domain, &*ca.service_account, ca.key), ("", "pay-sa", KeyKind::Rsa(2048)));
    assert_eq!(vm.xds.client.unwrap().key, Path::new("./etc/certs/key.pem"));
    assert!(vm.delta && !vm.output_for_all && vm.warnings.is_empty());
}

#[test]
fn a_pod_has_files_of_labels_and_annotations() {
    let mut told =
        told(&[("PROV_CERT", ""), ("OUTPUT_CERTS", ""), ("ISTIO_CPU_LIMIT", "2")], &|path| path == Path::new(POD_ROOT));
    told.mesh = None;
    told.labels = Some("app=\"x\"\npod-template-hash=\"1\"\n".to_owned());
    told.annotations = Some(
        "proxy.istio.io/config=\"drainDuration: 7s\\nstatusPort: 0\"\n\
         traffic.sidecar.istio.io/excludeInterfaces=\"eth1\"\nsidecar.istio.io/discoveryAddress=\"d:15010\"\n"
            .to_owned(),
    );
    told.flags.domain = "payments.svc.example".to_owned();
    let pod = bootstrap(told).unwrap();
    assert_eq!(pod.node.metadata["LABELS"]["app"], "x");
    assert_eq!(pod.node.metadata["STATIC_LABELS"]["app"], "pay");
    assert_eq!(pod.node.metadata["INSTANCE_IPS"], "10.0.1.5");
    assert!(!pod.node.metadata["LABELS"].as_object().unwrap().contains_key("pod-template-hash"));
    assert_eq!((pod.drain.drain.as_secs(), pod.ports.status, pod.concurrency), (7, 0, Some(2)));
    assert_eq!((&*pod.xds.address, pod.node.dns_domain.as_str()), ("d:15010", "payments.svc.example"));
    assert_eq!(pod.xds.roots, Some(Roots::File(PathBuf::from(POD_ROOT))));
}

#[test]
fn what_cannot_be_meant_is_refused_by_name() {
    for (said, expected) in [
        (("ISTIO_META_DNS_CAPTURE", "yes"), "ISTIO_META_DNS_CAPTURE: expected true or false"),
        (("ISTIO_META_POD_PORTS", "x"), "ISTIO_META_POD_PORTS: expected"),
        (("FILE_MOUNTED_CERTS", "true"), "PROV_CERT and FILE_MOUNTED_CERTS"),
        (("CA_PROVIDER", "GoogleCA"), "CA_PROVIDER: only Citadel"),
        (("ECC_SIGNATURE_ALGORITHM", "RSA"), "ECC_SIGNATURE_ALGORITHM"),
        (("WORKLOAD_IDENTITY_SOCKET_FILE", "a/b"), "WORKLOAD_IDENTITY_SOCKET_FILE: expected a file's name"),
        (("PROXY_CONFIG", "discoveryAddress: x"), "discoveryAddress: expected host:port"),
        (("PROXY_CONFIG", "a: [\n"), "PROXY_CONFIG:"),
        (("XDS_ROOT_CA", "/none.pem"), "root certificate for discovery: /none.pem is not there"),
    ] {
        let error = vm(&[said]).unwrap_err().to_string();
        assert!(error.starts_with(expected), "{error}");
    }
    let bad = vm(&[("SECRET_TTL", "soon"), ("ISTIO_METAJSON_X", "{")]).unwrap();
    assert_eq!(bad.warnings.len(), 2, "{:?}", bad.warnings);
}

#[test]
fn certificates_that_nobody_writes_are_the_identity() {
    let all = |path: &Path| path.starts_with("etc/certs") || path.starts_with("./etc/certs");
    let files = bootstrap(told(&[("OUTPUT_CERTS", "")], &all)).unwrap();
    assert!(matches!(files.identity, Identity::Files(_)));
    let ours = bootstrap(told(&[("OUTPUT_CERTS", "etc/certs/")], &all)).unwrap();
    assert!(matches!(ours.identity, Identity::Ca(_)));
    let ca = bootstrap(told(&[("CA_ADDR", ""), ("ISTIOD_SAN", "san"), ("ECC_SIGNATURE_ALGORITHM", "ECDSA")], &|p| {
        p.ends_with("root-cert.pem")
    }));
    let Identity::Ca(ca) = ca.unwrap().identity else { panic!("a certificate is asked for") };
    assert_eq!(
        (&*ca.server.address, ca.server.name.as_deref(), ca.key),
        ("istiod.istio-system.svc:15012", Some("san"), KeyKind::P256)
    );
}
