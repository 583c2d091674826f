use super::*;
use crate::identity::News;

const EMPTY: &[u8] = b"";

fn settings(folder: &std::path::Path, certs: Certs) -> Settings {
    Settings { input: Input::XdsDir(folder.to_owned()), who: WhoAmI::Env(BTreeMap::new()), certs, publish_health: None }
}

#[test]
fn the_same_texts_are_no_news() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("lds.pb"), EMPTY).unwrap();
    let mut control = Control::start(settings(dir.path(), Certs::None)).unwrap();
    assert_eq!(control.published().version, 1);
    std::fs::write(dir.path().join("lds.pb"), EMPTY).unwrap();
    assert!(control.reload().is_none());
    std::fs::write(dir.path().join("cds.pb"), EMPTY).unwrap();
    assert_eq!(control.reload().unwrap().version, 2);
}

#[test]
fn what_cannot_be_read_leaves_the_last_good_and_is_told_until_it_heals() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("lds.pb");
    std::fs::write(&file, EMPTY).unwrap();
    let mut control = Control::start(settings(dir.path(), Certs::None)).unwrap();
    std::fs::remove_file(&file).unwrap();
    let news = control.reload().unwrap();
    assert!(news.rejects[0].to_string().contains("the last good one stays"), "{:?}", news.rejects);
    assert!(control.reload().is_none(), "told once");
    std::fs::write(&file, EMPTY).unwrap();
    assert!(control.reload().unwrap().rejects.is_empty());
}

#[test]
fn certificates_are_required_at_start_and_renewed_later() {
    let (dir, certs) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    std::fs::write(dir.path().join("lds.pb"), EMPTY).unwrap();
    let with = settings(dir.path(), Certs::Folder(certs.path().to_owned()));
    let error = Control::start(with.clone()).map(|_| ()).unwrap_err();
    assert!(error.to_string().contains("cert-chain.pem"), "{error}");
    let (root, _) = crate::ca::Root::generate("test").unwrap();
    let sign = || root.sign_into(certs.path(), &"spiffe://td/ns/a/sa/b".parse().unwrap(), DAY).unwrap();
    sign();
    let mut control = Control::start(with).unwrap();
    assert!(control.reload().is_none());
    sign();
    let renewed = control.reload().unwrap();
    assert_eq!(renewed.version, 2);
    std::fs::write(certs.path().join("key.pem"), "broken").unwrap();
    let kept = control.reload().unwrap();
    assert!(kept.rejects[0].resource == "Certificates" && kept.snapshot.secrets() == renewed.snapshot.secrets());
}

#[tokio::test]
async fn an_issued_certificate_is_waited_for_published_and_kept() {
    let (dir, lists) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    std::fs::write(dir.path().join("lds.pb"), EMPTY).unwrap();
    let revoked = lists.path().join("ca-crl.pem");
    let (send, news) = channel::channel(News { trouble: Some("CA is away".to_owned()), ..News::default() });
    let certs = Certs::Issued { news, revoked: Some(revoked.clone()) };
    let control = Control::start(settings(dir.path(), certs)).unwrap();
    let (publish, mut published) = channel::channel(control.published());
    assert_eq!(published.borrow().unready(0), ["no workload certificate yet: CA is away"]);
    let (_ask, asked) = mpsc::channel(1);
    tokio::spawn(run(control, publish, asked));
    let (root, _) = crate::ca::Root::generate("test").unwrap();
    let folder = tempfile::tempdir().unwrap();
    root.sign_into(folder.path(), &"spiffe://td/ns/a/sa/b".parse().unwrap(), DAY).unwrap();
    let secrets = Secrets::load(folder.path()).unwrap();
    send.send_replace(News { secrets: secrets.clone(), ..News::default() });
    let served = published.wait_for(|p| *p.snapshot.secrets() == secrets).await.unwrap().clone();
    assert!(served.unready(0).is_empty());
    // What keeps the next one away is told; the old one is served.
    send.send_replace(News { secrets: secrets.clone(), trouble: Some("CA is gone".to_owned()), ..News::default() });
    let told = published.wait_for(|p| p.rejects.iter().any(|r| r.to_string().contains("CA is gone"))).await;
    let told = told.unwrap().clone();
    assert!(*told.snapshot.secrets() == secrets && told.unready(0).is_empty());
    // Lists that cannot be read let nothing in that is new.
    std::fs::write(&revoked, "garbage").unwrap();
    send.send_replace(News { secrets: secrets.clone(), ..News::default() });
    let told = published.wait_for(|p| p.rejects.iter().any(|r| r.to_string().contains("ca-crl.pem"))).await;
    assert!(*told.unwrap().snapshot.secrets() == secrets);
}

#[test]
fn mounted_files_are_read_and_followed() {
    let (dir, certs) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    std::fs::write(dir.path().join("lds.pb"), EMPTY).unwrap();
    let (root, _) = crate::ca::Root::generate("test").unwrap();
    let sign = || root.sign_into(certs.path(), &"spiffe://td/ns/a/sa/b".parse().unwrap(), DAY).unwrap();
    sign();
    let at = |name: &str| certs.path().join(name);
    let files = proxy_config::bootstrap::PemFiles {
        chain: at("cert-chain.pem"),
        key: at("key.pem"),
        root: at("root-cert.pem"),
    };
    let (say, anchors) = channel::channel(Vec::new());
    let mounted = Certs::Mounted { files, revoked: None, anchors: Some(anchors) };
    let mut control = Control::start(settings(dir.path(), mounted)).unwrap();
    assert!(control.published().snapshot.secrets().identity("default").is_some() && control.reload().is_none());
    sign();
    assert_eq!(control.reload().unwrap().version, 2);
    // CAs that the control plane names are trusted beside the file's.
    let (further, _) = crate::ca::Root::generate("further").unwrap();
    say.send_replace(vec![further.certificate().to_owned()]);
    assert_eq!(control.reload().unwrap().snapshot.secrets().roots("ROOTCA").unwrap().info.len(), 2);
    say.send_replace(Vec::new());
    assert_eq!(control.reload().unwrap().snapshot.secrets().roots("ROOTCA").unwrap().info.len(), 1);
}

#[test]
fn the_last_good_version_of_an_object_stays() {
    let dir = tempfile::tempdir().unwrap();
    let pod = "apiVersion: v1\nkind: Pod\nmetadata: {name: w, namespace: a}\n\
        spec: {serviceAccountName: w}\nstatus: {phase: Running, podIP: 10.0.0.1}\n";
    std::fs::write(dir.path().join("pod.yaml"), pod).unwrap();
    let write = |action: &str, path: &str| {
        let policy = format!(
            "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: p, namespace: a}}\n\
             spec: {{action: {action}, rules: [{{to: [{{operation: {{paths: [{path}]}}}}]}}]}}\n"
        );
        std::fs::write(dir.path().join("policy.yaml"), policy).unwrap();
    };
    write("ALLOW", "/first");
    let me = [("POD_NAMESPACE", "a"), ("INSTANCE_IP", "10.0.0.1")];
    let paths = yaml::Paths { config: vec![dir.path().to_owned()], ..yaml::Paths::default() };
    let mut control = Control::start(Settings {
        input: Input::Yaml(paths),
        who: WhoAmI::Env(me.map(|(name, value)| (name.to_owned(), value.to_owned())).into()),
        certs: Certs::MadeUp,
        publish_health: None,
    })
    .unwrap();
    write("ALLOW", "/second");
    control.reload().unwrap();
    write("ALOW", "/third");
    let news = control.reload().unwrap();
    let said = format!("{:?}", news.model.listeners["virtualInbound"]);
    assert!(said.contains("/second") && !said.contains("/first") && !said.contains("/third"));
    assert!(news.rejects.iter().any(|r| r.to_string().contains("policy.yaml:4:16")), "{:?}", news.rejects);
}

const DAY: std::time::Duration = std::time::Duration::from_secs(86_400);
