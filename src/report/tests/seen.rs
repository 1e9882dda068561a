//! What was looked at, on the page.

use super::*;

/// What two layers of two chose, by cell.
fn looked(cells: &[(usize, u32)]) -> Record {
    let mut counts = vec![None; BEFORE];
    counts.resize(BEFORE + VISUAL, Some(0));
    for &(cell, layers) in cells {
        counts[cell] = Some(layers);
    }
    let counts = crate::trace::Counts::new(&counts);
    Record::Looked { layers: 2, counts }
}

/// The masks of the small pictures: width, height, and how dark each pixel is.
fn masks(page: &str) -> Vec<(u32, u32, Vec<u8>)> {
    let strip = page.split("<div class=\"strip\"").nth(1).unwrap_or("");
    let masks = strip.split("href=\"data:image/png;base64,").skip(1);
    masks
        .map(|mask| {
            let text = mask.split('"').next().unwrap();
            let bytes = base64::Engine::decode(&base64::engine::general_purpose::STANDARD, text);
            let mask = ::image::load_from_memory(&bytes.unwrap()).unwrap();
            let mask = mask.to_luma_alpha8();
            let dark = mask.pixels().map(|pixel| pixel.0[1]).collect();
            (mask.width(), mask.height(), dark)
        })
        .collect()
}

/// The sample with lookups in the steps of the answer.
fn looking(mut records: Vec<Record>, choices: &[&[(usize, u32)]]) -> Vec<Record> {
    let mut choices = choices.iter();
    let mut at = 0;
    while let Some(record) = records.get(at) {
        if matches!(
            record,
            Record::Planned {
                after: After::Step,
                ..
            }
        ) {
            let Some(cells) = choices.next() else { break };
            records.insert(at, looked(cells));
            at += 1;
        }
        at += 1;
    }
    records
}

#[test]
fn each_sentence_has_a_picture_of_what_was_looked_at() {
    // Patches of row 3, column 5 and of row 0, column 0; one of the whole view, over four of them.
    let (a, b) = (BEFORE + 3 * 13 + 5, BEFORE);
    let whole = BEFORE + 12 * 13 + 1 + 2 * 7 + 4;
    let words: [&[u8]; 4] = [b" One", b" <two>.", b" Three", b"!"];
    let last = planned(After::Step, &[], &[]);
    let records = looking(
        records(&[], &words, last),
        // The step of a sentence's mark asks for the next one.
        &[
            &[(a, 2), (b, 1)],
            &[(a, 1)],
            &[(whole, 2), (b, 1)],
            &[(b, 1)],
        ],
    );
    let story = stories(Path::new("x"), &records).unwrap().remove(0);
    let told: Vec<(&str, usize, u64)> = story
        .sentences
        .iter()
        .map(|s| (s.text.as_str(), s.steps, s.layers))
        .collect();
    assert_eq!(told, [("One <two>.", 1, 2), ("Three!", 3, 6)]);
    let shares: Vec<_> = story.moments.iter().map(|m| m.attended.shares()).collect();
    assert_eq!(shares[0], None, "the prompt's");
    let first = shares[1].unwrap();
    assert_eq!((first.steps, first.vision), (1, Some(3.0 / (2.0 * 199.0))));
    // Of text, and of the token itself, every layer sees all.
    assert_eq!(first.all, (3.0 + 2.0 * 4.0) / (2.0 * 203.0));

    let page = page_of(&records);
    assert_eq!(page.matches("<svg class=\"seen\"").count(), 2);
    assert!(page.contains("One &lt;two&gt;.") && page.contains("Three!"));
    assert!(page.contains("1 token, up to 100 % of layers"), "{page}");
    let masks = masks(&page);
    let bright = |mask: &(u32, u32, Vec<u8>)| -> Vec<(usize, u8)> {
        assert_eq!((mask.0, mask.1), (12, 12));
        let numbered = mask.2.iter().copied().enumerate();
        numbered.filter(|(_, dark)| *dark < 225).collect()
    };
    assert_eq!(bright(&masks[0]), [(0, 112), (3 * 12 + 5, 0)]);
    // 2 + 0 of 6 on the patch of the whole view, 1 + 1 of 6 on the corner, 1 of 6 on the other.
    let four = [4 * 12 + 8, 4 * 12 + 9, 5 * 12 + 8, 5 * 12 + 9];
    let [w, x, y, z] = four.map(|at| (at, 0));
    assert_eq!(bright(&masks[1]), [(0, 0), (3 * 12 + 5, 112), w, x, y, z]);
    assert!(page.contains("Share of the cache that a layer attends to"));
    for word in ["<script", "url(", "http://e"] {
        assert!(!page.contains(word), "{word}");
    }
}

#[test]
fn tokens_without_known_places_are_drawn_in_their_order() {
    let last = planned(After::Step, &[], &[]);
    let mut records = looking(
        records(&[], &[b"A", b".", b" B."], last),
        &[&[(BEFORE + 20, 2)], &[]],
    );
    let Record::Shown { layout, .. } = &mut records[0] else {
        panic!("{records:?}")
    };
    *layout = None;
    for known in [true, false] {
        // Without the picture too.
        let page = page_of(if known { &records } else { &records[1..] });
        assert!(page.contains("drawn row by row"), "{page}");
        let masks = masks(&page);
        assert_eq!(masks.len(), 2);
        assert_eq!((masks[0].0, masks[0].1), (15, 14));
        let bright = masks[0].2.iter().position(|dark| *dark < 225);
        assert_eq!(bright, Some(20));
        // The second sentence's step chose nothing of the picture.
        assert!(masks[1].2.iter().all(|dark| *dark == 225));
    }
}

#[test]
fn pages_of_runs_without_lookups_stay_as_they_were() {
    let last = planned(After::Step, &[], &[5]);
    let page = page_of(&records(&[6], &[b"A.", b"B.", b"C."], last));
    for word in ["looked at", "class=\"strip\"", "Share of the cache"] {
        assert!(!page.contains(word), "{word}");
    }
}

#[test]
fn a_long_story_shows_its_first_sentences() {
    let words = vec![&b" Yes."[..]; 40];
    let last = planned(After::Step, &[], &[]);
    let choices = vec![&[(BEFORE, 1)][..]; 40];
    let page = page_of(&looking(records(&[], &words, last), &choices));
    assert_eq!(page.matches("<svg class=\"seen\"").count(), 24);
    assert!(page.contains("16 more sentences are not shown."));
}

#[test]
fn of_many_pictures_a_sentence_shows_those_that_were_looked_at_most() {
    let mut all = vec![Record::Turn];
    all.extend((0..6).map(|i| inserted(4 * i, 4, Origin::picture(i as u32))));
    all.push(inserted(24, 1, Origin::TEXT));
    all.push(planned(After::Prompt { pruned: false }, &[], &[]));
    all.extend([inserted(25, 1, Origin::TEXT), text(25, b" Yes.")]);
    let counts: Vec<Option<u32>> = (0..24)
        .map(|cell| Some([1, 3, 4, 0, 9, 2][cell / 4]))
        .collect();
    all.push(Record::Looked {
        layers: 9,
        counts: crate::trace::Counts::new(&counts),
    });
    all.push(planned(After::Step, &[], &[]));
    let page = page_of(&all);
    assert_eq!(page.matches("<svg class=\"seen\"").count(), 4);
    assert!(page.contains("Pictures 2, 3, 5, 6. 1 token, up to 100 %"));
    let dark: Vec<u8> = masks(&page).iter().map(|(.., dark)| dark[0]).collect();
    assert_eq!(dark, [150, 125, 0, 175]);
}
