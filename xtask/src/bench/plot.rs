//! The ratios to plain as bars on a logarithmic axis; to the right is good, also where less is better.

use std::fmt::Write;

use super::Peer;
use super::report::{Better, Report};

const LEFT: f64 = 380.0;
const WIDTH: f64 = 460.0;
const RIGHT: f64 = 70.0;
const TOP: f64 = 64.0;
const BAR: f64 = 9.0;
const GAP: f64 = 9.0;
/// The axis begins at a hundredth of plain and ends at twice.
const LOW: f64 = 0.01;
const HIGH: f64 = 2.0;
const TICKS: [f64; 8] = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0];

pub(super) fn svg(report: &Report) -> String {
    let peers: Vec<Peer> = report.peers.iter().copied().filter(|&peer| peer != Peer::Plain).collect();
    // Speed as a share of plain's: of a time, the inverse ratio.
    let rows: Vec<(&str, Vec<(Peer, f64)>)> = report
        .rows
        .iter()
        .filter_map(|(row, cells)| {
            let shares = peers.iter().filter_map(|&peer| {
                let ratio = cells.get(&peer)?.ratio?;
                match row.better {
                    Better::More => Some((peer, ratio)),
                    Better::Less if ratio > 0.0 => Some((peer, 1.0 / ratio)),
                    Better::Less | Better::Neither => None,
                }
            });
            let shares: Vec<(Peer, f64)> = shares.collect();
            (!shares.is_empty()).then_some((row.title, shares))
        })
        .collect();
    let height_of = |bars: usize| bars as f64 * BAR + GAP;
    let bottom = TOP + rows.iter().map(|(_, shares)| height_of(shares.len())).sum::<f64>();
    let (width, height) = (LEFT + WIDTH + RIGHT, bottom + 30.0);
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" font-family=\"sans-serif\" font-size=\"11\">\n\
         <rect width=\"{width}\" height=\"{height}\" fill=\"white\"/>\n\
         <text x=\"12\" y=\"20\" font-size=\"14\">Performance as a share of plain TCP (1 = plain; of a time, the inverse of its ratio)</text>\n"
    );
    // A String takes every write.
    for (nth, peer) in peers.iter().enumerate() {
        let x = 12.0 + nth as f64 * 110.0;
        let _ = writeln!(
            out,
            "<rect x=\"{x}\" y=\"32\" width=\"10\" height=\"10\" fill=\"{}\"/><text x=\"{}\" y=\"41\">{peer}</text>",
            colour(*peer),
            x + 16.0
        );
    }
    for tick in TICKS {
        let x = at(tick);
        let stroke = if tick == 1.0 { "#444" } else { "#ddd" };
        let _ = writeln!(
            out,
            "<line x1=\"{x:.1}\" y1=\"{TOP}\" x2=\"{x:.1}\" y2=\"{bottom:.1}\" stroke=\"{stroke}\"/>\
             <text x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\" fill=\"#555\">{tick}</text>",
            bottom + 16.0
        );
    }
    let mut y = TOP;
    for (title, shares) in rows {
        let middle = y + height_of(shares.len()) / 2.0 + 4.0;
        let title = title.replace('&', "&amp;").replace('<', "&lt;");
        let _ = writeln!(out, "<text x=\"{:.1}\" y=\"{middle:.1}\" text-anchor=\"end\">{title}</text>", LEFT - 8.0);
        y += GAP / 2.0;
        for (peer, share) in shares {
            let end = at(share);
            let _ = writeln!(
                out,
                "<rect x=\"{LEFT}\" y=\"{y:.1}\" width=\"{:.1}\" height=\"{:.1}\" fill=\"{}\"/>\
                 <text x=\"{:.1}\" y=\"{:.1}\" font-size=\"9\" fill=\"#333\">{share:.2}</text>",
                (end - LEFT).max(1.0),
                BAR - 1.0,
                colour(peer),
                end + 3.0,
                y + BAR - 1.5
            );
            y += BAR;
        }
        y += GAP / 2.0;
    }
    out.push_str("</svg>\n");
    out
}

fn at(share: f64) -> f64 {
    let place = (share.clamp(LOW, HIGH) / LOW).ln() / (HIGH / LOW).ln();
    LEFT + place * WIDTH
}

fn colour(peer: Peer) -> &'static str {
    match peer {
        Peer::Plain => "#999999",
        Peer::Culvert => "#1b7f79",
        Peer::Envoy => "#c26a1d",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::report::tests::report;

    #[test]
    fn a_bar_ends_at_its_share_and_titles_are_escaped() {
        assert_eq!((at(LOW), at(HIGH), at(0.0)), (LEFT, LEFT + WIDTH, LEFT));
        let svg = svg(&report());
        // Only Culvert has a ratio there: 2.75 of 11.
        assert_eq!(svg.matches("font-size=\"9\"").count(), 1);
        assert!(svg.contains(">0.25</text>"), "{svg}");
        assert!(svg.starts_with("<svg") && svg.ends_with("</svg>\n"));
    }
}
