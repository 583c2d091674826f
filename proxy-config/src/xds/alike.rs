//! What thousands of resources say alike, kept once.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::model::{Cluster, ClusterKind, Endpoints, Name, Shared};

type Labels = Shared<BTreeMap<String, String>>;

/// Different sets of labels that are remembered; a mesh has one or two.
const LABELS: usize = 16;

/// Remembers what was said before, for resources that are read one after the other.
#[derive(Debug, Default)]
pub struct Alike {
    labels: Vec<Labels>,
    no_metadata: Shared<BTreeMap<String, Value>>,
}

impl Alike {
    /// Lets a load assignment share what it can.
    pub fn endpoints(&mut self, of: &mut Endpoints) {
        for endpoint in of.localities.iter_mut().flat_map(|locality| &mut locality.endpoints) {
            self.labels(&mut endpoint.transport_labels);
            if endpoint.metadata.is_empty() {
                endpoint.metadata = self.no_metadata.clone();
            }
        }
    }

    /// Lets a cluster share what it can.
    pub fn cluster(&mut self, of: &mut Cluster) {
        for socket in &mut of.transport_matches {
            self.labels(&mut socket.labels);
        }
        if let ClusterKind::Eds(name) = &mut of.kind
            && *name == of.name
        {
            *name = Name::clone(&of.name);
        }
    }

    fn labels(&mut self, of: &mut Labels) {
        match self.labels.iter().find(|known| *known == of) {
            Some(known) => *of = known.clone(),
            None if self.labels.len() < LABELS => self.labels.push(of.clone()),
            None => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Endpoint, LocalityEndpoints};

    fn said(label: &str) -> Endpoints {
        let endpoint = Endpoint {
            address: crate::model::Address::Pipe("p".to_owned()),
            health: Default::default(),
            weight: 1,
            transport_labels: [("tlsMode".to_owned(), label.to_owned())].into_iter().collect(),
            workload: Name::default(),
            hostname: String::new(),
            metadata: Shared::default(),
        };
        let locality = LocalityEndpoints { endpoints: vec![endpoint], ..LocalityEndpoints::default() };
        Endpoints { localities: vec![locality], ..Endpoints::default() }
    }

    #[test]
    fn equal_labels_are_one_object_and_others_stay() {
        let mut alike = Alike::default();
        let mut all = [said("istio"), said("disabled"), said("istio")];
        let before = all.clone();
        all.iter_mut().for_each(|one| alike.endpoints(one));
        assert_eq!(all, before);
        let labels = |n: usize| &all[n].localities[0].endpoints[0].transport_labels;
        assert!(labels(0).same(labels(2)) && !labels(0).same(labels(1)));
        for n in 0..100 {
            alike.endpoints(&mut said(&n.to_string()));
        }
        assert_eq!(alike.labels.len(), LABELS, "it does not grow for ever");
    }
}
