//! What a push costs beside 5,000 clusters: one load assignment alone, and the same as a compilation of everything.

use std::hint::black_box;
use std::sync::Arc;

use bench_harness::istiod::resources;
use criterion::{Criterion, criterion_group, criterion_main};
use istio_proxy::snapshot::{self, Snapshot};
use istio_proxy::tls::Secrets;
use proxy_config::model::Endpoints;
use proxy_config::{Model, Name, xds};

const CLUSTERS: usize = 5_000;

fn name(n: usize) -> String {
    format!("outbound|80||service-{n}.namespace.svc.cluster.local")
}

fn endpoints(name: &str, last: u8) -> Arc<Endpoints> {
    let hosts: Vec<_> = (1..10).chain([last]).map(|n| ([10, 0, 0, n], 80).into()).collect();
    Arc::new(xds::endpoints(&resources::assignment(name, &hosts)).expect("valid").value)
}

fn mesh() -> (Model, Snapshot) {
    let mut model = Model::default();
    for name in (0..CLUSTERS).map(name) {
        let cluster = xds::cluster(&resources::eds_cluster(&name, 5)).expect("valid").value;
        model.clusters.insert(name.as_str().into(), Arc::new(cluster));
        model.endpoints.insert(name.as_str().into(), endpoints(&name, 100));
    }
    let (snapshot, rejects) = snapshot::compile(None, &model, &Secrets::new());
    assert!(rejects.is_empty());
    (model, snapshot)
}

fn pushes(c: &mut Criterion) {
    let (model, snapshot) = mesh();
    let changed: Vec<Name> = vec![name(17).as_str().into()];
    let said = [endpoints(&changed[0], 101), endpoints(&changed[0], 102)];
    let mut turn = 0;
    // As control does it: the model's maps are shared with what is served.
    let mut next = || {
        turn += 1;
        let mut model = model.clone();
        model.endpoints.insert(Arc::clone(&changed[0]), Arc::clone(&said[turn % 2]));
        model
    };
    c.bench_function("one endpoint of 5,000 clusters, alone", |b| {
        b.iter(|| black_box(snapshot::compile_endpoints(&snapshot, &next(), &changed)));
    });
    c.bench_function("one endpoint of 5,000 clusters, everything", |b| {
        b.iter(|| black_box(snapshot::compile(Some(&snapshot), &next(), &Secrets::new())));
    });
}

criterion_group!(benches, pushes);
criterion_main!(benches);
