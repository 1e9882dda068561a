//! A results file: a table of all policies, accuracy against memory, and times.

use maud::{Markup, PreEscaped, html};

use super::Results;
use super::chart::{self, Axes, Dot, Ink};
use crate::error::Result;
use crate::eval::summary::{Row, Summary};
use crate::policy::evicts_nothing;

/// How many colours the style sheet has for policies; the first is that of `full`.
const INKS: u8 = 13;

/// The colours of the policies of a file, in the order in which they appear.
struct Inks<'a>(Vec<&'a str>);

impl<'a> Inks<'a> {
    fn of(rows: &[&'a Row]) -> Self {
        let mut policies: Vec<&str> = Vec::new();
        for row in rows {
            if !evicts_nothing(&row.policy) && !policies.contains(&row.policy.as_str()) {
                policies.push(&row.policy);
            }
        }
        Inks(policies)
    }

    fn ink(&self, policy: &str) -> Ink {
        match self.0.iter().position(|known| *known == policy) {
            Some(i) => Ink(1 + (i % usize::from(INKS - 1)) as u8),
            None => Ink(0),
        }
    }
}

pub fn section(results: &Results) -> Result<Markup> {
    let Results {
        path,
        header,
        answers,
    } = results;
    let summary = Summary::of(header, answers);
    let rows: Vec<&Row> = summary.overall().filter(|row| row.n > 0).collect();
    let inks = Inks::of(&rows);
    let n = rows.iter().map(|row| row.n).max().unwrap_or(0);
    Ok(html! {
        h2 { (path.display()) }
        p.soft {
            (header.model.file) ", " (n) " questions of " (header.questions.file.file)
            @if let Some(part) = &header.questions.part { " (" (part) ")" }
            ", each under " (rows.len()) " policies. hae "
            (header.build["version"].as_str().unwrap_or("?"))
        }
        (table(&rows, &inks))
        (quality_charts(&rows, &inks)?)
        (times(&rows, &inks)?)
        (tasks(&summary))
    })
}

fn chip(ink: Ink) -> Markup {
    html! { span.chip style={ "background:var(--c" (ink.0) ")" } {} }
}

fn percent(share: Option<f64>) -> String {
    share.map_or_else(|| "–".into(), |x| format!("{:.1}", x * 100.0))
}

fn number(x: Option<f64>, digits: usize) -> String {
    x.map_or_else(|| "–".into(), |x| format!("{x:.digits$}"))
}

fn table(rows: &[&Row], inks: &Inks<'_>) -> Markup {
    let any = |of: fn(&Row) -> bool| rows.iter().any(|row| of(row));
    let accuracy = any(|row| row.accuracy.is_some());
    let facts = any(|row| row.recall.is_some());
    let distance = any(|row| row.kl_mean.is_some());
    let mib = |bytes: f64| format!("{:.2}", bytes / f64::from(1 << 20));
    html! {
        div.wide { table {
            thead { tr {
                th { "policy" } th { "answers" }
                @if accuracy { th { "right %" } th { "95 % interval" } }
                @if facts { th { "facts %" } th { "kept %" } }
                @if distance { th { "KL" } th { "top-1 %" } th { "attention lost %" } }
                th { "KV MiB" } th { "at most" } th { "of the first" } th { "TTFT ms" } th { "TPOT ms" }
            } }
            tbody { @for row in rows { tr {
                td { (chip(inks.ink(&row.policy))) (row.contender) }
                td { (row.n) }
                @if accuracy {
                    td { (percent(row.accuracy)) }
                    td { (percent(row.low)) " to " (percent(row.high)) }
                }
                @if facts { td { (percent(row.recall)) } td { (percent(row.facts_kept)) } }
                @if distance {
                    td { (number(row.kl_mean, 3)) } td { (percent(row.top1)) }
                    td { (percent(row.attention_lost)) }
                }
                td { (mib(row.bytes_in_use)) }
                td { (mib(row.bytes_peak_decoding)) }
                td { (number(row.kv_of_first, 2)) }
                td { (number(row.ttft_ms, 0)) }
                td { (number(row.tpot_ms, 2)) }
            } } }
        } }
    }
}

/// What is drawn against memory, if it was measured.
struct Quality {
    title: &'static str,
    axis: &'static str,
    of: fn(&Row) -> Option<f64>,
    interval: fn(&Row) -> Option<(f64, f64)>,
}

const QUALITIES: [Quality; 3] = [
    Quality {
        title: "Accuracy against KV memory",
        axis: "right answers, %",
        of: |row| row.accuracy,
        interval: |row| row.low.zip(row.high),
    },
    Quality {
        title: "Facts in stories against KV memory",
        axis: "facts told, %",
        of: |row| row.recall,
        interval: |_| None,
    },
    Quality {
        title: "Agreement with the full cache against KV memory",
        axis: "same likeliest token, %",
        of: |row| row.top1,
        interval: |_| None,
    },
];

fn quality_charts(rows: &[&Row], inks: &Inks<'_>) -> Result<Markup> {
    let mut out = String::new();
    for quality in &QUALITIES {
        if rows.iter().any(|row| (quality.of)(row).is_some()) {
            out.push_str(&quality_chart(quality, rows, inks)?.into_string());
        }
    }
    Ok(PreEscaped(out))
}

fn quality_chart(quality: &Quality, rows: &[&Row], inks: &Inks<'_>) -> Result<Markup> {
    let memory = |row: &Row| row.bytes_peak_decoding / f64::from(1 << 20);
    let mut groups: Vec<Vec<Dot>> = Vec::new();
    let mut names: Vec<&str> = Vec::new();
    for row in rows {
        let Some(share) = (quality.of)(row) else {
            continue;
        };
        let group = match names.iter().position(|name| *name == row.policy) {
            Some(group) => group,
            None => {
                names.push(&row.policy);
                groups.push(Vec::new());
                names.len() - 1
            }
        };
        groups[group].push(Dot {
            ink: inks.ink(&row.policy),
            at: (memory(row), share * 100.0),
            interval: (quality.interval)(row).map(|(low, high)| (low * 100.0, high * 100.0)),
            label: row.budget.clone().unwrap_or_default(),
        });
    }
    for dots in &mut groups {
        dots.sort_by(|a, b| a.at.0.total_cmp(&b.at.0));
    }
    let all: Vec<&Dot> = groups.iter().flatten().collect();
    let low = |dot: &&Dot| dot.interval.map_or(dot.at.1, |(low, _)| low);
    let floor = all.iter().map(low).fold(100.0, f64::min);
    let floor = ((floor - 2.0) / 5.0).floor().max(0.0) * 5.0;
    let most = all.iter().map(|dot| dot.at.0).fold(0.0, f64::max);
    let axes = Axes {
        x: "KV cache while answering, MiB (mean of the most cells in use)",
        y: quality.axis,
        x_range: 0.0..(most * 1.06).max(1e-6),
        y_range: floor..101.0,
    };
    let front = front(all.iter().map(|dot| dot.at));
    Ok(html! {
        h3 { (quality.title) }
        div.legend { @for (name, dots) in names.iter().zip(&groups) {
            span { (chip(dots[0].ink)) (name) }
        } span { "- - the best at each size" } }
        div.wide { (PreEscaped(chart::dots(&axes, &groups, &front)?)) }
    })
}

/// The points that no other beats in both memory and quality, as steps.
fn front(points: impl Iterator<Item = (f64, f64)>) -> Vec<(f64, f64)> {
    let mut points: Vec<(f64, f64)> = points.collect();
    points.sort_by(|a, b| a.0.total_cmp(&b.0).then(b.1.total_cmp(&a.1)));
    let mut front: Vec<(f64, f64)> = Vec::new();
    for (x, y) in points {
        match front.last() {
            Some(&(_, best)) if y <= best => {}
            Some(&(_, best)) => front.extend([(x, best), (x, y)]),
            None => front.push((x, y)),
        }
    }
    front
}

fn times(rows: &[&Row], inks: &Inks<'_>) -> Result<Markup> {
    let chart = |title: &str, of: fn(&Row) -> Option<f64>, digits: usize| -> Result<Markup> {
        let bars: Vec<_> = rows
            .iter()
            .filter_map(|row| {
                let ms = of(row)?;
                let shown = format!("{ms:.digits$} ms");
                Some((row.contender.clone(), inks.ink(&row.policy), ms, shown))
            })
            .collect();
        if bars.is_empty() {
            return Ok(html! {});
        }
        Ok(html! {
            h3 { (title) }
            div.wide { (PreEscaped(chart::bars(&bars)?)) }
        })
    };
    Ok(html! {
        (chart("Time to the first token (median)", |row| row.ttft_ms, 0)?)
        (chart("Time per further token (median)", |row| row.tpot_ms, 2)?)
    })
}

/// Accuracy by task, where there is more than one.
fn tasks(summary: &Summary) -> Markup {
    let scored = |row: &&Row| row.accuracy.is_some();
    let all: Vec<&Row> = summary.overall().filter(scored).collect();
    let mut tasks: Vec<&str> = Vec::new();
    for row in summary.rows.iter().filter(scored) {
        if row.task != crate::eval::summary::ALL && !tasks.contains(&row.task.as_str()) {
            tasks.push(&row.task);
        }
    }
    if tasks.len() < 2 {
        return html! {};
    }
    let of = |contender: &str, task: &str| {
        let own = |row: &&Row| row.contender == contender && row.task == task;
        summary.rows.iter().find(own).and_then(|row| row.accuracy)
    };
    html! {
        h3 { "Right answers by task, %" }
        div.wide { table {
            thead { tr { th { "policy" } @for task in &tasks { th { (task) } } } }
            tbody { @for row in &all { tr {
                td { (row.contender) }
                @for task in &tasks { td { (percent(of(&row.contender, task))) } }
            } } }
        } }
    }
}

#[cfg(test)]
mod tests {
    use super::front;

    #[test]
    fn the_front_leaves_out_what_is_beaten() {
        let points = [
            (3.0, 90.0),
            (1.0, 70.0),
            (2.0, 60.0),
            (1.0, 65.0),
            (4.0, 90.0),
        ];
        let expected = [(1.0, 70.0), (3.0, 70.0), (3.0, 90.0)];
        assert_eq!(front(points.into_iter()), expected);
    }
}
