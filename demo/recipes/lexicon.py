"""Word lists of the demo corpus. Everything was written by hand for this project; no dataset is copied.

Each list is one string that is split on white space (or on ``|`` where entries hold spaces), which keeps
hundreds of words readable.
"""

from __future__ import annotations


def words(text: str) -> tuple[str, ...]:
    """Split on white space."""
    return tuple(text.split())


def phrases(text: str) -> tuple[str, ...]:
    """Split on ``|``; an entry holds spaces."""
    return tuple(" ".join(part.split()) for part in text.split("|"))


POSITIVE = words("""
    good great excellent wonderful fantastic amazing brilliant superb lovely delightful charming perfect
    outstanding terrific marvellous fabulous splendid enjoyable pleasant impressive beautiful stunning
    gorgeous memorable moving touching gripping fascinating engaging entertaining funny hilarious clever
    smart witty fresh tasty delicious flavourful yummy generous friendly kind helpful polite warm
    welcoming attentive comfortable cosy clean spotless bright quiet elegant stylish smooth fast quick
    reliable sturdy solid handy useful practical affordable fair honest exciting thrilling inspiring
    refreshing satisfying rewarding remarkable exceptional magnificent incredible awesome nice fine
    flawless crisp sharp intuitive simple relaxing magical captivating heartwarming powerful uplifting
    thoughtful original professional prompt efficient courteous cheerful adorable phenomenal
    unforgettable first-class
""")

NEGATIVE = words("""
    bad terrible awful horrible dreadful poor boring dull tedious disappointing annoying irritating
    ugly disgusting nasty unpleasant mediocre weak stupid silly pointless predictable confusing messy
    bland tasteless stale cold greasy soggy burnt salty overcooked undercooked rude unfriendly unhelpful
    slow careless impolite dirty filthy noisy cramped uncomfortable shabby smelly dark broken faulty
    flimsy fragile cheap-looking useless unreliable clumsy overpriced expensive dishonest shallow
    forgettable lifeless flat lazy unbearable pathetic ridiculous frustrating depressing painful miserable
    appalling atrocious abysmal lousy rotten sloppy chaotic incompetent hopeless worthless insulting
    exhausting dreary tiresome laughable clunky buggy laggy blurry unwatchable unreadable inedible
    horrendous disastrous embarrassing underwhelming unprofessional ghastly worst-ever second-rate
""")

INTENSIFIERS = words(
    "very really so extremely truly absolutely quite incredibly simply totally utterly pretty"
)

LOVED = phrases("""
    loved | really loved | enjoyed | thoroughly enjoyed | adored | liked | really liked | admired | fell
    in love with | was delighted by | was impressed by | was amazed by | was thrilled with | am happy
    with | can't praise enough | was blown away by | love | really like | am so pleased with
""")

HATED = phrases("""
    hated | really hated | disliked | detested | regretted | couldn't stand | did not like | didn't
    enjoy | was bored by | was disappointed by | was annoyed by | was shocked by | was let down by | am
    unhappy with | hate | really dislike | can't stand | am so disappointed with | did not enjoy |
    didn't like
""")

GOOD_END = phrases("""
    I would recommend it to anyone | Highly recommended | I will definitely come back | Worth every
    penny | I want to see it again | Five stars | I would buy it again | Best of the year | It made my
    day | A real treat | I can't wait to return | We will be back | It exceeded my expectations | I
    smiled the whole time | Do not miss it | A masterpiece | Well worth it | Great value for money | I
    am very happy | Money well spent | Two thumbs up | I could not be happier | Everything was perfect |
    It never gets old | One of the best ever | Go for it | I recommend it | Best money I ever spent |
    What a joy | Thank you so much | Would recommend
""")

BAD_END = phrases("""
    I would not recommend it to anyone | Avoid it | I will never come back | A waste of money | I want
    my money back | One star | I would not buy it again | Worst of the year | It ruined my day | What a
    mess | Never again | We will not return | It failed my expectations | I fell asleep | Stay away | A
    disaster | Not worth it | Far too much money for that | I am very unhappy | Money down the drain |
    Two thumbs down | I could not wait to leave | Nothing worked | It got worse and worse | One of the
    worst ever | Save your money | I do not recommend it | Worst money I ever spent | What a shame | I
    asked for a refund | Would not recommend | A waste of time | I sent it back | It broke after two
    days | We left early | I wanted to walk out
""")

FILLERS = phrases("""
    I watched it with my sister | We went there last week | I bought it in May | It was our second visit
    | My friend told me about it | I read about it online | We were a group of six | It was a rainy
    evening | I waited for months | It was a gift for my brother | We stayed for three nights | It was
    my birthday | I use it every day | My family came along | I had some time on Sunday | We ordered for
    two | I tried it yesterday | It arrived on Monday | I saw it at the weekend | My wife chose it | My
    husband picked it | This was my first time
""")

# domain -> (things, aspects); an aspect's name is the label of the aspect task.
DOMAINS: dict[str, tuple[tuple[str, ...], dict[str, tuple[str, ...]]]] = {
    "screen": (
        words("film movie show series documentary comedy drama sequel thriller musical"),
        {
            "acting": phrases("acting | cast | lead actor | lead actress | performance | whole cast"),
            "story": phrases("story | plot | script | ending | storyline | dialogue"),
            "sound": phrases("music | soundtrack | sound | score"),
        },
    ),
    "page": (
        words("book novel story memoir biography poem comic"),
        {
            "story": phrases("plot | ending | story | first chapter | storyline"),
            "writing": phrases("writing | prose | style"),
        },
    ),
    "table": (
        words("restaurant cafe bistro diner pub bar place pizzeria bakery"),
        {
            "food": phrases(
                "food | soup | pizza | pasta | steak | dessert | bread | salad | burger"
                " | coffee | curry | fish"
            ),
            "service": phrases("service | staff | waiter | waitress | team | host"),
            "price": phrases("price | bill | menu price | cost"),
        },
    ),
    "stay": (
        words("hotel hostel inn resort apartment guesthouse motel"),
        {
            "room": phrases("room | bed | bathroom | shower | view | pool"),
            "service": phrases("service | staff | receptionist | reception | cleaning team"),
            "price": phrases("price | rate | cost | bill"),
        },
    ),
    "device": (
        words(
            "phone laptop camera tablet speaker headset watch printer keyboard television app game product"
        ),
        {
            "screen": phrases("screen | display | picture | touchscreen"),
            "battery": phrases("battery | charger | battery life"),
            "sound": phrases("sound | speaker | microphone | volume"),
            "price": phrases("price | cost"),
        },
    ),
}

FIRST_NAMES = words("""
    Anna Ben Carla David Emma Felix Grace Henry Iris Jack Kate Leo Maria Nina Oscar Paula Quinn Rosa Sam
    Tina Victor Wendy Zoe Adam Bella Chloe Daniel Ella Frank Gina Hugo Ivy James Laura Max Nora Oliver
    Peter Rachel Simon Thomas Alice Bruno Clara Diego Elena Fiona George Hannah Ian Julia Kevin Linda
    Martin Olga Paul Robert Sarah Tom Ahmed Yuki Chen Priya Omar Fatima Ravi Mei Lars Ingrid Pablo Lucia
    Marco Sofia Ivan Aisha Kofi Amara
""")

SURNAMES = words("""
    Stone Hill Baker Field Brook Wood Marsh Fisher Carter Turner Walker Hunter Cooper Mason Miller Parker
    Porter Reed Rivers Smith Taylor Ward Webb West Weaver Wells White Young Adams Allen Bell Bennett Bishop
    Black Brown Burns Butler Clark Cole Cook Cruz Dixon Fox Garcia Gomez Grant Gray Green Hall Harris Hayes
    Hughes Jensen Jones Kelly Kim King Lane Lee Lopez Moore Morgan Murphy Nash Novak Olsen Ortiz Patel Perez
    Pierce Price Reyes Rossi Russo Sato Silva Singh Snow Suzuki Tanaka Torres Vega Wagner Weber Wolf Yang
""")

CITIES = words("""
    London Paris Berlin Madrid Rome Vienna Oslo Dublin Lisbon Prague Athens Cairo Tokyo Boston Chicago
    Denver Seattle Cambridge Oxford Bristol Leeds York Geneva Milan Naples Porto Munich Hamburg Warsaw
    Krakow Budapest Helsinki Stockholm Toronto Montreal Sydney Lima Bogota Delhi Mumbai Seoul Bangkok
    Nairobi Lagos Austin Dallas Miami
""")

PLACE_ADJECTIVES = words("""
    Golden Blue Red Green Silver Old Little Royal Hungry Happy Crooked Black White Wild Lazy Rusty Merry
    Secret Hidden Copper Iron Stone Sunny Misty Velvet Crystal Humble Jolly Quiet Rolling Twisted Lucky
    Brave Sleepy Dancing Flying Singing Laughing Painted Broken Burning Frozen Wooden Amber Scarlet
    Crimson Emerald Ivory Grand Noble Gentle Clever Bright Salty Spicy Sweet Smoky Northern Southern
    Eastern Western Ancient Modern Urban Rustic Purple Orange Pink
""")

PLACE_NOUNS = words("""
    Eagle Lion Fox Bear Horse Swan Crown Anchor Garden Kitchen Table Spoon Fork Plate Mill Bridge Tower
    Rose Oak Lantern Wolf Otter Heron Owl Raven Badger Stag Whale Dolphin Turtle Rabbit Goose Duck
    Pigeon Sparrow Robin Falcon Hawk Tiger Dragon Phoenix Ship Boat Harbour Lighthouse River Mountain
    Valley Forest Meadow Orchard Barn Cottage Castle Palace Gate Wall Window Door Candle Kettle Oven
    Pepper Olive Lemon Apple Plum Cherry Fig Basil Ginger Saffron Thistle Clover Willow Maple Cedar Pine
    Elm Birch Star Moon Sun Cloud Wind Rain Storm Wave Shore Island Feather Bell Drum Fiddle Piper Baker
    Miller Sailor Shepherd Hunter Vine Barrel Goat Pear Boar Wheel Arrow Shield Pilot Waterman Cricketer
    Plough
""")

PLACE_KINDS = words(
    "Cafe Bistro Grill House Kitchen Inn Tavern Diner Room Corner Bar Club Lounge Pizzeria Place"
)

FOODS = words("""
    Italian French Indian Chinese Japanese English Thai Mexican Spanish Greek Turkish Korean Vietnamese
    Lebanese Moroccan Ethiopian Peruvian Brazilian American Polish German Russian Persian Cuban Swedish
    Irish Scottish
""") + phrases("vegan | vegetarian | fast | sea | street | organic | Middle Eastern")
TYPES = phrases(
    "restaurant | pub | cafe | bar | bistro | diner | coffee shop | tea room | wine bar | pizzeria | bakery"
)
AREAS = phrases("""
    riverside | city centre | harbour | old town | market | station | university | suburb | north side |
    south side | east end | west end | seaside | village | castle | park | canal | hill | business |
    airport
""")
PRICES = phrases(
    "cheap | expensive | affordable | moderate | pricey | mid-range | low-cost | high-end | modest | costly"
)
RATINGS = phrases("""
    excellent | good | average | poor | very good | high | low | 1 out of 5 | 2 out of 5 | 3 out of 5 |
    4 out of 5 | 5 out of 5
""")
KIDS = phrases("welcome | not welcome")
JOBS = words("""
    doctor teacher baker nurse pilot farmer painter lawyer driver writer singer dentist builder cook
    engineer plumber gardener librarian actor chemist sailor tailor photographer musician
""")

SONG_ARTISTS = phrases(
    "the Beatles | Mozart | some jazz | rock music | piano music | my workout playlist | the latest hits"
    "| country music | a lullaby | my favourite album | some blues | hip hop | classical music"
    "| the radio | old songs"
)
ROOMS = phrases(
    "kitchen | bedroom | living room | bathroom | hallway | garage | garden | office | basement | dining room"
)
ITEMS = phrases("""
    milk | eggs | bread | apples | coffee | rice | soap | paper towels | batteries | shoes | a new lamp
    | tea | butter | cheese | tomatoes | sugar | shampoo | a birthday card | dog food | bananas | flour
    | onions | a phone case
""")
EVENTS = phrases("""
    dentist appointment | team meeting | lunch with Anna | piano lesson | job interview | birthday party
    | yoga class | doctor's appointment | parents' evening | football match | haircut | book club |
    dinner with Tom | conference call | school play | wedding
""")
DAYS = phrases("""
    today | tomorrow | on Monday | on Tuesday | on Wednesday | on Thursday | on Friday | on Saturday |
    on Sunday | next week | this weekend | tonight | this afternoon | tomorrow morning
""")
TIMES = phrases("""
    6 am | 7 am | 8 am | 9 am | 10 am | noon | 3 pm | 5 pm | 6 pm | 8 pm | half past six | quarter to
    eight | seven o'clock | 6:30 | 7:15 | 10:45 | midnight | five thirty
""")
SUMS = phrases(
    "20 dollars | 50 euros | 100 pounds | 75 dollars | 10 euros | 300 dollars | 15 pounds | 45 euros"
    "| 1000 dollars"
)

MONTHS = words("January February March April May June July August September October November December")
WEEKDAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")

COMMON_NOUNS = words("""
    apple river stone table chair window garden letter bridge pencil candle mirror bottle basket blanket
    hammer ladder button carpet dog cat horse bird fish mouse tree leaf flower grass road street house
    door wall roof floor kitchen spoon knife plate cup glass paper book page word song drum piano guitar
    train bus car boat ship plane wheel clock watch phone lamp coat shirt shoe hat glove scarf ring coin
    box bag rope chain key lock map flag ball game toy doll cake bread butter cheese honey sugar salt
    pepper lemon orange peach grape onion carrot potato tomato bean rice cloud rain snow wind storm sun
    moon star sky sea lake island beach mountain hill valley forest field farm barn teacher doctor nurse
    farmer baker sailor soldier painter singer king queen child friend brother sister mother father
""")
PROSE_ADJECTIVES = words("""
    old young small large tall short long narrow wide heavy light soft hard round square empty full early late
    grey brown yellow blue green red black white wooden silver distant nearby local foreign strange familiar
""")
VERBS_PAST = words("""
    saw found carried moved watched followed opened closed painted washed cleaned sold bought lost kept
    held pushed pulled dropped lifted covered counted remembered described visited passed crossed
    noticed repaired built
""")
PLACES = phrases("""
    near the river | in the garden | behind the house | at the market | on the hill | by the sea | under
    the bridge | in the old town | across the street | at the station | in the kitchen | along the road
    | next to the school | inside the barn | at the edge of the forest | on the table | in the library
""")
WHEN = phrases("""
    In the morning | After lunch | Before dawn | Every evening | Last winter | On a cold day | Late at
    night | In those years | The next day | Some time later | During the summer | At noon | Once a week
    | Long ago
""")
